"""FLAP against the figures of its published implementation, on the embedded model and the same tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.activations import InputStatistics
from baselines.flap import FLAP
from harness.fidelity.replay import multi_head_expansion
from harness.models import LoadedModel
from harness.structure import KeepPlan, count_parameters

GOLDEN = json.loads(gzip.decompress((Path(__file__).parents[1] / "golden" / "flap.json.gz").read_bytes()))
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in GOLDEN["cases"]}
GROUPED = "derived_gqa_alam_wifv_0.2"
LOSS_TOLERANCE = 2e-3
Statistics = dict[str, InputStatistics]


@pytest.fixture(scope="module")
def loaded_for(smollm2: LoadedModel) -> Callable[[str], LoadedModel]:
    twin = multi_head_expansion(smollm2)
    return lambda name: smollm2 if name == GROUPED else twin


@pytest.fixture(scope="module")
def statistics(smollm2: LoadedModel, golden_tokens: Callable[[int, int], Tensor]) -> Statistics:
    """Of one pass: repeating kv heads changes no input of o_proj or down_proj."""
    return FLAP().statistics(smollm2, golden_tokens(64, 128))


@pytest.fixture(scope="module")
def plan_of(
    loaded_for: Callable[[str], LoadedModel], statistics: Statistics, fidelity_mode: Any
) -> Callable[[str], tuple[dict[str, Tensor], KeepPlan]]:
    def plan(name: str) -> tuple[dict[str, Tensor], KeepPlan]:
        method, loaded = fidelity_mode("flap", name), loaded_for(name)
        scores = method.scores(loaded.model, loaded.structure, statistics)
        return scores, method.plan_at(scores, loaded.structure, CASES[name]["settings"]["pruning_ratio"])

    return plan


@pytest.mark.parametrize("name", CASES)
def test_channel_metrics_are_the_published_ones(
    name: str, loaded_for: Callable[[str], LoadedModel], statistics: Statistics, fidelity_mode: Any
) -> None:
    method, loaded = fidelity_mode("flap", name), loaded_for(name)
    for layer, figures in CASES[name]["metrics"].items():
        heads, channels = (loaded.structure.by_name[f"layers.{layer}.{kind}"] for kind in ("attention", "mlp"))
        attention = method.channel_metric(loaded.model, heads, statistics[f"model.layers.{layer}.self_attn.o_proj"])
        mlp = method.channel_metric(loaded.model, channels, statistics[f"model.layers.{layer}.mlp.down_proj"])
        per_head = attention.view(heads.num_units, -1).sum(1)
        assert per_head.tolist() == pytest.approx(figures["attn_raw_channel_sum_per_head"], rel=1e-4)
        assert mlp.tolist() == pytest.approx(figures["mlp_raw"], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["settings"]["structure"].startswith("AL")])
def test_standardised_scores_are_the_published_ones(name: str, plan_of: Any) -> None:
    scores, _ = plan_of(name)
    for layer, figures in CASES[name]["metrics"].items():
        heads, channels = scores[f"layers.{layer}.attention"], scores[f"layers.{layer}.mlp"]
        # Standardised scores are of the order of one and pass through zero: the tolerance is absolute.
        assert heads.tolist() == pytest.approx(figures["attn_std_per_head"], abs=1e-4)
        assert channels.tolist() == pytest.approx(figures["mlp_std"], abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_kept_units_and_counted_parameters_are_the_published_ones(
    name: str, plan_of: Any, loaded_for: Callable[[str], LoadedModel], statistics: Statistics, fidelity_mode: Any
) -> None:
    _, plan = plan_of(name)
    loaded = loaded_for(name)
    everything = torch.arange(1536)
    for i, figures in enumerate(CASES[name]["layers"]):
        removed = torch.tensor(figures["removed_mlp_channels"], dtype=torch.int64)
        assert torch.equal(plan[f"layers.{i}.mlp"], everything[~torch.isin(everything, removed)]), i
        assert plan[f"layers.{i}.attention"].tolist() == figures["kept_heads"], i
    pruned = fidelity_mode("flap", name).compress(loaded, plan, statistics)
    if name == GROUPED:
        expected = CASES[name]["params_after_in_gqa_form"]["total_excl_bias"] + CASES[name]["params_after"]["bias"]
    else:
        expected = CASES[name]["params_after"]["total_incl_bias"]
    assert count_parameters(pruned.named_parameters()).total == expected


@pytest.mark.parametrize("name", CASES)
def test_biases_have_the_published_norms(
    name: str, plan_of: Any, loaded_for: Callable[[str], LoadedModel], statistics: Statistics, fidelity_mode: Any
) -> None:
    pruned = fidelity_mode("flap", name).compress(loaded_for(name), plan_of(name)[1], statistics)
    for i, figures in CASES[name]["bias_norm"].items():
        layer = pruned.model.layers[int(i)]
        assert float(layer.self_attn.o_proj.bias.norm()) == pytest.approx(figures["o_proj"], rel=1e-4), i
        assert float(layer.mlp.down_proj.bias.norm()) == pytest.approx(figures["down_proj"], rel=1e-4), i


def test_heldout_loss_of_grouped_query_pruning_is_the_derived_one(
    plan_of: Any, smollm2: LoadedModel, statistics: Statistics, heldout_loss: Callable[[Any], float], fidelity_mode: Any
) -> None:
    pruned = fidelity_mode("flap", GROUPED).compress(smollm2, plan_of(GROUPED)[1], statistics)
    assert heldout_loss(pruned) == pytest.approx(CASES[GROUPED]["eval_nll"], abs=LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("compensated", "key"), [(True, "eval_nll"), (False, "eval_nll_nobias")])
@pytest.mark.parametrize("name", CASES)
def test_heldout_loss_is_the_published_one_with_and_without_compensation(
    name: str,
    compensated: bool,
    key: str,
    plan_of: Any,
    loaded_for: Callable[[str], LoadedModel],
    statistics: Statistics,
    heldout_loss: Callable[[Any], float],
    fidelity_mode: Any,
) -> None:
    method = fidelity_mode("flap", name, bias_compensation=compensated)
    pruned = method.compress(loaded_for(name), plan_of(name)[1], statistics)
    assert heldout_loss(pruned) == pytest.approx(CASES[name][key], abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_the_multi_head_twin_gives_the_same_statistics(
    loaded_for: Callable[[str], LoadedModel], statistics: Statistics, golden_tokens: Callable[[int, int], Tensor]
) -> None:
    twin = FLAP().statistics(loaded_for("alam_wifv_0.2"), golden_tokens(64, 128))
    for module, expected in statistics.items():
        torch.testing.assert_close(
            twin[module].running_fluctuation, expected.running_fluctuation, rtol=1e-4, atol=0, msg=module
        )
