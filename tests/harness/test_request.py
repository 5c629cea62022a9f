"""From flags and files to a comparison; what is refused, and in which words."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import cli
from harness.errors import UserError
from harness.records import EfficiencySpec
from harness.request import NOT_IN_FILE, comparison_from, model_ref, one_sparsity, settings_of

FLAGS: dict[str, Any] = {
    "models": "smollm2-135m",
    "methods": "all",
    "sparsities": "0.2,0.4",
    "basis": "total",
    "seeds": "0",
    "calibration": "wikipedia",
    "calibration_samples": 64,
    "calibration_length": 128,
    "tasks": None,
    "profile": "quick",
    "limit": None,
    "mmlu_limit": None,
    "mmlu_shots": None,
    "heldout_tokens": None,
    "offline": None,
    "efficiency": True,
    "stream": False,
    "set_": [],
    "recovery": "none",
    "recovery_tokens": "100k",
    "recovery_text": "reading",
    "train": [],
    "config": None,
    "dtype": "float32",
    "round_to": None,
    "uniform": False,
    "out": Path("results"),
    "force": False,
    "device": "cpu",
    "batch_tokens": 4096,
}


def test_defaults_compare_every_method_on_the_embedded_model() -> None:
    comparison = comparison_from(FLAGS, (), None)
    assert [model.name for model in comparison.models] == ["smollm2-135m"]
    assert {"dense", "random", "magnitude", "llm-pruner", "flap", "slicegpt", "adapt-pruner"} <= set(comparison.methods)
    assert comparison.sparsities == (0.2, 0.4)
    assert len(comparison.evaluation.tasks) == 8
    assert comparison.efficiency == EfficiencySpec()
    assert comparison_from({**FLAGS, "efficiency": False}, {"efficiency"}, None).efficiency is None
    assert comparison_from({**FLAGS, "stream": True}, {"stream"}, None).efficiency is None


def test_quick_profile_keeps_adapt_pruners_steps_affordable_unless_told_otherwise() -> None:
    assert comparison_from(FLAGS, (), None).method_params == {"adapt-pruner": {"samples_per_step": 8}}
    told = {**FLAGS, "set_": ["adapt-pruner.samples_per_step=16"]}
    assert comparison_from(told, {"set_"}, None).method_params["adapt-pruner"] == {"samples_per_step": 16}
    assert comparison_from({**FLAGS, "profile": "standard"}, (), None).method_params == {}


def test_a_profile_picks_tasks_and_documents_unless_told_otherwise() -> None:
    evaluations = {
        name: comparison_from({**FLAGS, "profile": name}, (), None).evaluation for name in ("quick", "standard", "full")
    }
    assert [e.limit for e in evaluations.values()] == [40, 200, None]
    assert [e.mmlu_num_fewshot for e in evaluations.values()] == [0, 5, 5]
    assert [len(e.tasks) for e in evaluations.values()] == [8, 9, 13]
    assert "boolq" not in evaluations["full"].tasks  # its passages are the default calibration text
    told = comparison_from({**FLAGS, "profile": "standard", "tasks": "piqa", "limit": 3}, {"tasks", "limit"}, None)
    assert (told.evaluation.tasks, told.evaluation.limit, told.evaluation.mmlu_limit) == (("piqa",), 3, 10)


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_dtype_auto_is_bfloat16_where_the_processor_multiplies_it(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    # The spec holds what was chosen: a number never depends on which machine reads it.
    assert comparison_from({**FLAGS, "dtype": "auto"}, {"dtype"}, None).dtype == expected
    assert comparison_from({**FLAGS, "dtype": "bfloat16"}, {"dtype"}, None).dtype == "bfloat16"


def test_dense_is_always_there_to_compare_with() -> None:
    assert comparison_from({**FLAGS, "methods": "flap"}, (), None).methods == ("dense", "flap")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "compare.toml"
    file.write_text('sparsities = [0.1]\nmethods = ["flap"]\nseeds = [0, 1]\n[params.flap]\nmetric = "wifn"\n')
    comparison = comparison_from({**FLAGS, "seeds": "7"}, {"seeds"}, file)
    assert comparison.sparsities == (0.1,)
    assert comparison.seeds == (7,)
    assert comparison.method_params == {"flap": {"metric": "wifn"}}


def test_set_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "compare.toml"
    file.write_text('[params.flap]\nmetric = "wifn"\n')
    comparison = comparison_from({**FLAGS, "set_": ["flap.metric=ifv"]}, {"set_"}, file)
    assert comparison.method_params["flap"] == {"metric": "ifv"}


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("methods", "flapp", "unknown method 'flapp'; did you mean 'flap'?"),
        ("models", "smollm2-135", "unknown model 'smollm2-135'; did you mean 'smollm2-135m'?"),
        ("models", "./no-such-folder", "there is no model folder ./no-such-folder"),
        ("tasks", "arc_esay", "unknown task 'arc_esay'; did you mean 'arc_easy'?"),
        ("sparsities", "1.0", "sparsity 1.0 is not in [0, 1)"),
        ("sparsities", "-0.1", "sparsity -0.1 is not in [0, 1)"),
        ("sparsities", "a fifth", "sparsity a fifth is not in [0, 1)"),
        ("sparsities", "nan", "sparsity nan is not in [0, 1)"),
        ("sparsities", ",", "an empty list was given"),
        ("seeds", "one", "seed 'one' is not a whole number"),
        ("basis", "all", "basis 'all' is not known; pass one of total, non-embedding"),
        ("profile", "fast", "profile 'fast' is not known; pass one of quick, standard, full"),
        ("limit", 0, "limit = 0 is not allowed"),
        ("calibration_samples", 0, "num_samples = 0 is not allowed"),
        ("set_", ["flap.metrc=wifn"], "unknown setting of flap 'metrc'; did you mean 'metric'?"),
        ("set_", ["flap.metric=l7"], "flap.metric = 'l7' is not allowed"),
        ("set_", ["flap"], "--set 'flap' is not of the form method.setting=value"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(flag: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        comparison_from({**FLAGS, flag: value}, {flag}, None)
    assert message in str(caught.value)


def test_settings_of_a_method_that_is_not_compared_are_refused() -> None:
    with pytest.raises(UserError, match="'flap', which is not compared"):
        comparison_from({**FLAGS, "methods": "magnitude", "set_": ["flap.metric=wifn"]}, (), None)


def test_an_unknown_key_in_the_file_is_refused_with_the_closest(tmp_path: Path) -> None:
    file = tmp_path / "compare.toml"
    file.write_text("sparsitys = [0.1]\n")
    with pytest.raises(UserError, match="did you mean 'sparsities'"):
        comparison_from(FLAGS, (), file)


@pytest.mark.parametrize("flag", sorted(NOT_IN_FILE))
def test_where_and_how_it_runs_is_not_for_a_file(tmp_path: Path, flag: str) -> None:
    file = tmp_path / "compare.toml"
    file.write_text(f'{flag} = "1/2"')
    flags = dict.fromkeys(inspect.signature(cli.compare).parameters) | FLAGS
    with pytest.raises(UserError, match=f"unknown setting in .*{flag}"):
        comparison_from(flags, (), file)


@pytest.mark.parametrize("text", ["params = 3", "[params]\nflap = 3"])
def test_settings_of_methods_are_tables(tmp_path: Path, text: str) -> None:
    file = tmp_path / "compare.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"write \[params\.flap\]"):
        comparison_from(FLAGS, (), file)


@pytest.mark.parametrize(
    "text", ['uniform = "no"', 'efficiency = "no"', 'offline = "no"', "limit = true", "round_to = true"]
)
def test_yes_and_no_are_true_and_false_where_they_are_asked_for_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "compare.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"compare\.toml is not (true or false|a number)"):
        comparison_from(FLAGS, (), file)


@pytest.mark.parametrize("value", ['"64"', "[64]", "64.5", "0"])
def test_a_multiple_is_a_positive_whole_number(tmp_path: Path, value: str) -> None:
    file = tmp_path / "compare.toml"
    file.write_text(f"round_to = {value}")
    with pytest.raises(UserError, match="is not a multiple; pass a positive number"):
        comparison_from(FLAGS, (), file)


def test_another_text_in_the_calibration_file_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    found = []
    for text in ("one", "two"):
        file.write_text(text)
        found.append(comparison_from({**FLAGS, "calibration": str(file)}, (), None).calibration)
    assert found[0] != found[1]
    assert comparison_from(FLAGS, (), None).calibration.sha256 is None


def test_one_held_out_token_predicts_nothing() -> None:
    with pytest.raises(UserError, match="leaves no token to predict"):
        comparison_from({**FLAGS, "heldout_tokens": 1}, (), None)


def test_steps_of_a_training_are_whole_windows() -> None:
    changes = {"recovery": "full", "train": ["batch_tokens=1000"]}
    with pytest.raises(UserError, match=r"no multiple of context_length 512.* pass --train batch_tokens=1024"):
        comparison_from({**FLAGS, **changes}, (), None)


@pytest.mark.parametrize("tokens", ["inf", "nan", "1e400", "many"])
def test_tokens_that_are_no_number_are_refused(tokens: str) -> None:
    with pytest.raises(UserError, match="is not a number; pass one such as 200k"):
        comparison_from({**FLAGS, "recovery": "full", "recovery_tokens": tokens}, (), None)


def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "compare.toml"
    file.write_text("sparsities = [")
    with pytest.raises(UserError, match=r"compare\.toml is not valid TOML"):
        comparison_from(FLAGS, (), file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        comparison_from(FLAGS, (), tmp_path / "none.toml")


def test_settings_may_leave_the_method_out() -> None:
    assert settings_of("flap", ["metric=wifn"]) == settings_of("flap", ["flap.metric=wifn"]) == {"metric": "wifn"}


def test_sparsity_zero_is_allowed() -> None:
    assert one_sparsity("0") == 0.0


def test_trainings_are_alike_but_for_what_learns_and_its_rate() -> None:
    flags = {**FLAGS, "recovery": "none,lora,full", "recovery_tokens": "1.5k", "train": ["context_length=64"]}
    none, lora, full = comparison_from(flags, (), None).recoveries
    assert none is None
    assert lora is not None
    assert full is not None
    assert (lora.mode, lora.tokens, lora.learning_rate, lora.context_length) == ("lora", 1500, 1e-4, 64)
    assert full == lora.model_copy(update={"mode": "full", "learning_rate": 2e-5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recovery": "some"}, "recovery 'some' is not known; pass one of none, lora, full"),
        (
            {"recovery": "full", "recovery_tokens": "lots"},
            "training tokens 'lots' is not a number; pass one such as 200k",
        ),
        ({"recovery": "full", "train": ["rate=1"]}, "unknown training setting 'rate'"),
        ({"recovery": "full", "train": ["learning_rate"]}, "is not of the form setting=value"),
        ({"recovery": "full", "train": ["learning_rate=-1"]}, "learning_rate = -1 is not allowed"),
        ({"recovery": "full", "stream": True}, "where they cannot be trained; leave out --recovery"),
        ({"methods": "adapt-accel"}, "adapt-accel trains between its pruning steps"),
        ({"methods": "adapt-accel", "recovery": "lora"}, "add --recovery full"),
    ],
)
def test_a_training_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        comparison_from({**FLAGS, **changes}, (), None)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("owner/model", ("owner/model", None)),
        ("owner/model@v1.2", ("owner/model", "v1.2")),
        ("llama-3.1-8b@abc123", ("llama-3.1-8b", "abc123")),
    ],
)
def test_a_model_may_be_pinned_to_a_revision(name: str, found: tuple[str, str | None]) -> None:
    ref = model_ref(name)
    assert (ref.name, ref.revision) == found
