"""The command line from end to end, on a tiny checkpoint with the real tokenizer and the real documents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from harness.records import RunRecord
from harness.store import Store

SMALL = [
    "--limit",
    "2",
    "--mmlu-limit",
    "1",
    "--mmlu-shots",
    "0",
    "--heldout-tokens",
    "64",
    "--tasks",
    "arc_easy,winogrande",
]
CALIBRATION = ["--calibration-samples", "4", "--calibration-length", "32"]


def harness(*arguments: str, expect: int = 0) -> str:
    environment = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def compared(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A results folder and what making it printed."""
    out = tmp_path_factory.mktemp("results")
    methods = ["--methods", "flap,slicegpt", "--sparsities", "0,0.02", "--basis", "non-embedding"]
    shown = harness("compare", "--models", str(checkpoint), *methods, *SMALL, *CALIBRATION, "--out", str(out))
    return out, shown


def test_compare_ends_with_a_leaderboard_of_matched_sizes(compared: tuple[Path, str]) -> None:
    out, shown = compared
    table = pd.read_csv(out / "latest" / "leaderboard.csv")
    leading = [
        "model",
        "method",
        "target_sparsity",
        "basis",
        "sparsity_total",
        "sparsity_non_embedding",
        "params_total",
    ]
    assert list(table.columns[: len(leading)]) == leading
    methods = table[table["method"] != "chance"]
    assert list(methods["method"]).count("flap") == list(methods["method"]).count("slicegpt") == 2
    flap = methods[(methods["method"] == "flap") & (methods["target_sparsity"] > 0)].iloc[0]
    assert 0 <= 0.02 - flap["sparsity_non_embedding"] < 3 * 48 * 2 / 150_000
    assert flap["macs_per_token"] < methods[methods["method"] == "dense"].iloc[0]["macs_per_token"]
    assert (methods[["prefill_vs_dense", "decode_vs_dense"]] > 0).all(axis=None)
    assert "4 documents (2 of arc_easy, winogrande)" in shown.split("Leaderboard")[0]
    dense = methods[methods["method"] == "dense"].iloc[0]
    assert (dense["kl_dense"], dense["kl_dense_ci_high"]) == (0, 0)
    assert flap["kl_dense"] > 0
    assert "To reproduce" in (out / "latest" / "leaderboard.md").read_text()


def test_sparsity_zero_scores_as_dense_to_the_last_bit(compared: tuple[Path, str]) -> None:
    store = Store(compared[0])
    records = {(r.spec.method, r.spec.sparsity): r for r in store.records()}
    dense = store.documents(records["dense", 0.0].spec.run_id)
    for method in ("flap", "slicegpt"):
        record = records[method, 0.0]
        assert record.params_after == record.params_before
        pd.testing.assert_frame_equal(store.documents(record.spec.run_id), dense)


def test_every_method_was_given_the_same_calibration_tokens(compared: tuple[Path, str]) -> None:
    hashes = {
        r.provenance.calibration_sha256
        for r in Store(compared[0]).records()
        if r.provenance is not None and r.spec.method != "dense"
    }
    assert len(hashes) == 1
    assert None not in hashes


def test_a_second_comparison_runs_nothing_and_shows_the_same(compared: tuple[Path, str], checkpoint: Path) -> None:
    out, _ = compared
    before = (out / "latest" / "leaderboard.csv").read_text()
    methods = ["--methods", "flap,slicegpt", "--sparsities", "0,0.02", "--basis", "non-embedding"]
    shown = harness("compare", "--models", str(checkpoint), *methods, *SMALL, *CALIBRATION, "--out", str(out))
    assert "5 runs, 5 of them done before" in shown
    assert (out / "latest" / "leaderboard.csv").read_text() == before


def test_report_rebuilds_the_table_from_records_alone(compared: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = compared
    harness("report", str(out), "--out", str(tmp_path), "--pairs")
    assert (tmp_path / "leaderboard.csv").read_text() == (out / "latest" / "leaderboard.csv").read_text()


def exact(record: RunRecord) -> dict[str, float]:
    """The measures that repeat: all but times."""
    return {m.name: m.value for m in record.measures if "second" not in m.name}


def test_a_track_can_be_repeated_by_hand(compared: tuple[Path, str], tmp_path: Path) -> None:
    track = next((compared[0] / "tracks").glob("*flap*.json"))
    values = {**json.loads(track.read_text()), "out": str(tmp_path / "again")}
    copy = tmp_path / "track.json"
    copy.write_text(json.dumps(values))
    done = subprocess.run(
        [sys.executable, "-m", "harness.runner", str(copy)], capture_output=True, text=True, check=True
    )
    assert [json.loads(line).get("text") for line in done.stdout.splitlines()].count("ok") == 2
    for record in Store(tmp_path / "again").records():
        first = Store(compared[0]).load(record.spec.run_id)
        assert exact(record) == pytest.approx(exact(first), rel=1e-6)


def test_prune_saves_a_folder_that_loads_evaluates_and_exports(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    arguments = ["--method", "flap", "--sparsity", "0.02", "--model", str(checkpoint), *CALIBRATION]
    assert "PrunedLlamaForCausalLM" in harness("prune", *arguments, "--out", str(out))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.model.layers[0].mlp.down_proj.bias is not None
    measures = tmp_path / "measures.json"
    shown = harness("evaluate", str(out), *SMALL, "--reference", str(checkpoint), "--json", str(measures))
    assert "4 documents (2 of arc_easy, winogrande) and 64 held-out tokens" in shown
    names = {m["name"] for m in json.loads(measures.read_text())}
    assert names >= {"arc_easy/acc_norm", "arc_easy/margin", "winogrande/acc", "heldout/kl_dense"}
    gguf = tmp_path / "pruned.gguf"
    assert "architecture deci" in harness("export", "--format", "gguf", str(out), "--out", str(gguf))
    assert gguf.read_bytes()[:4] == b"GGUF"


def test_the_card_of_a_pruned_folder_has_the_scores_of_the_run_that_it_equals(
    compared: tuple[Path, str], checkpoint: Path, tmp_path: Path
) -> None:
    results, _ = compared
    record = next(r for r in Store(results).records() if (r.spec.method, r.spec.sparsity) == ("flap", 0.02))
    arguments = ["--method", "flap", "--sparsity", "0.02", "--basis", "non-embedding", "--model", str(checkpoint)]
    harness("prune", *arguments, *CALIBRATION, "--results", str(results), "--out", str(tmp_path / "pruned"))
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert f"base_model: {record.spec.model.name}" in card
    assert f"{record.params_before.total:,} | {record.params_after.total:,}" in card
    assert f"Run `{record.spec.run_id}` (2 documents a task" in card
    assert all(f"| {m.name} | {m.value:.4f} |" in card for m in record.measures)
    assert "- metric: wifv" in card
    assert "- calibration: 4 x 32 tokens of wikipedia" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--methods", "flapp"], "unknown method 'flapp'; did you mean 'flap'?"),
        (["compare", "--sparsities", "1.5"], "sparsity 1.5 is not in [0, 1)"),
        (["compare", "--limit", "0"], "limit = 0 is not allowed"),
        (["prune", "--method", "flap", "--sparsity", "0.2", "--out", "tests"], "tests exists already"),
        (["evaluate", "harness"], "has no config.json"),
        (["compare", "--methods", "dense", "--recovery", "full"], "dense is not trained: name a method to prune with"),
        (["compare", "--device", "auto"], "name one device, such as cuda"),
        (["evaluate", "smollm2-135m", "--device", "cuda:7"], "device 'cuda:7' cannot be used here"),
        (["report", "docs"], "no runs in docs"),
        (["export", "smollm2-135m", "--precision", "q4"], "precision 'q4' is not known; pass one of float32, float16"),
        (["prune", "--method", "flap", "--sparsity", "0.2", "--out", "/dev/null/out"], "cannot write to the folder"),
        (["export", "smollm2-135m", "--out", "README.md"], "README.md exists already"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], message: str) -> None:
    shown = harness(*arguments, expect=2)
    assert message in shown
    assert "Traceback" not in shown
    assert len(shown.strip().splitlines()) == 1


def test_an_unreachable_sparsity_says_the_largest(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--method", "magnitude", "--sparsity", "0.9", "--model", str(checkpoint), "--out", str(tmp_path / "m")]
    assert "the largest sparsity it reaches is 0.0" in harness("prune", *arguments, expect=2)
    assert list(tmp_path.iterdir()) == []


def test_too_little_calibration_text_stops_the_comparison(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    arguments = ["--models", str(checkpoint), "--methods", "flap", "--calibration", str(text), *SMALL]
    shown = harness("compare", *arguments, "--out", str(tmp_path / "results"), expect=2)
    assert "has 4 tokens of the" in shown
    assert [r.spec.method for r in Store(tmp_path / "results").records()] == ["dense"]


@pytest.mark.parametrize("stop", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_comparison_keeps_what_is_finished_and_says_how_to_go_on(
    checkpoint: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    arguments = ["--models", str(checkpoint), "--methods", "magnitude", "--sparsities", "0.01,0.02,0.03", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.cli", "compare", *arguments, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    store = Store(tmp_path)
    deadline = time.monotonic() + 120
    while not store.run_ids() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, stop)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "the same command goes on with the rest" in shown
    assert all(record.status == "ok" for record in store.records())


@pytest.mark.slow
def test_regress_makes_the_candidate_by_the_references_specs(compared: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = compared
    candidate, junit = tmp_path / "candidate", tmp_path / "junit.xml"
    options = ["--reference", str(out), "--candidate", str(candidate), "--junit", str(junit)]
    # Four documents, all answered alike, exclude a drop by half and no smaller one.
    shown = harness("regress", *options, "--run", "--tolerance", "50")
    assert Store(candidate).run_ids() == Store(out).run_ids()
    assert "# Regression: ✅ pass" in shown
    assert 'failures="0" errors="0"' in junit.read_text()
    assert "cannot tell" in harness("regress", *options, "--tolerance", "1", expect=3)
    assert "cannot tell" in harness("regress", *options, "--tolerance", "1", "--allow-cannot-tell")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tolerance", "0"], "--tolerance 0 is not in (0, 100] points"),
        (["--run"], "--candidate is the reference itself"),
        (["--candidate", "nowhere"], "nowhere has no runs"),
        (["--candidate", "memory://nowhere"], "memory://nowhere has no runs"),
        (["--tolerance", "50", "--junit", "/dev/null/junit.xml"], "cannot write to the folder /dev/null"),
        (["--tolerance", "50", "--junit", ""], ". is a folder; name a file to write"),
    ],
)
def test_regress_refuses_what_it_cannot_use(options: list[str], message: str, compared: tuple[Path, str]) -> None:
    out, _ = compared
    same = ["--reference", str(out), "--candidate", str(out)]
    assert message in harness("regress", *same, *options, expect=2)


@pytest.mark.slow
def test_a_streamed_comparison_says_so_and_is_not_timed(checkpoint: Path, tmp_path: Path) -> None:
    harness(
        "compare", "--models", str(checkpoint), "--methods", "dense", "--stream", "--out", str(tmp_path),
        "--tasks", "arc_easy", "--limit", "1", "--heldout-tokens", "64",
    )  # fmt: skip
    (record,) = Store(tmp_path).records()
    assert record.status == "ok", record.reason
    assert record.spec.efficiency is None
    assert any("--stream" in note for note in record.notes)


def test_a_streamed_prune_is_a_folder_that_loads(checkpoint: Path, tmp_path: Path) -> None:
    told = harness(
        "prune", "--model", str(checkpoint), "--method", "magnitude", "--sparsity", "0.03", "--stream",
        "--out", str(tmp_path / "pruned"), "--results", str(tmp_path / "none"),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert f"{sum(p.numel() for p in model.parameters()):,} of " in told


@pytest.mark.slow
def test_a_comparison_trains_every_method_on_the_same_tokens(checkpoint: Path, tmp_path: Path) -> None:
    arguments = [
        "compare", "--models", str(checkpoint), "--methods", "flap,magnitude,adapt-accel", "--sparsities", "0.02",
        "--recovery", "none,lora,full", "--recovery-tokens", "512", "--train", "context_length=32",
        "--train", "batch_tokens=128", "--train", "heldout_points=2", "--set", "adapt-accel.rounds=2", *SMALL,
        *CALIBRATION, "--set", "adapt-accel.samples_per_step=4", "--out", str(tmp_path),
    ]  # fmt: skip
    shown = harness(*arguments)
    assert "Full training on 512 tokens of reading" in shown
    table = pd.read_csv(tmp_path / "latest" / "leaderboard.csv")
    assert set(table["status"]) == {"ok", "reference"}
    assert table.groupby("recovery")["method"].apply(sorted).to_dict() == {
        "none": ["dense", "flap", "magnitude"],
        "lora": ["flap", "magnitude"],
        "full": ["adapt-accel", "flap", "magnitude"],
    }
    texts = set()
    for record in Store(tmp_path).records():
        if record.spec.recovery is not None:
            told = record.trace["training"]
            assert isinstance(told, dict)
            texts.add(told["text_sha256"])
            assert [tokens for tokens, _ in told["heldout"]] == [256, 512]
            assert record.phase_seconds["train"] > 0
    assert len(texts) == 1
    assert not list((tmp_path / "cache" / "checkpoints").glob("*"))
