"""LLM-Pruner against the figures of its published implementation, on the embedded model and the same tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.gradients import matrix_scores
from baselines.importance import Criterion
from harness.fidelity.replay import multi_head_expansion
from harness.models import LoadedModel, remove_units
from harness.structure import KeepPlan, count_parameters

GOLDEN = json.loads(gzip.decompress((Path(__file__).parents[1] / "golden" / "llm_pruner.json.gz").read_bytes()))
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in GOLDEN["cases"]}
LOSS_TOLERANCE = 2e-3
SCORE_TOLERANCE = 1e-4

# One with channels alone, one that loses kv heads too.
QUICK_LOSSES = ("case3_taylor_first_4_25_r25", "x6_taylor_first_max_4_25_r50")
SLOW_LOSSES = tuple(name for name in CASES if name not in QUICK_LOSSES)


@pytest.fixture(scope="module")
def loaded_for(smollm2: LoadedModel) -> Callable[[str], LoadedModel]:
    twin = multi_head_expansion(smollm2)
    return lambda case: twin if CASES[case]["model"].endswith("-mha") else smollm2


@pytest.fixture(scope="module")
def matrices_of(
    loaded_for: Callable[[str], LoadedModel], golden_tokens: Callable[[int, int], Tensor], fidelity_mode: Any
) -> Callable[[str], dict[str, Tensor]]:
    """Channel scores of a case, from one pass per model and criterion: all layers serve the cases that rank fewer."""
    tokens = golden_tokens(10, 64)

    @cache
    def gather(model_case: str, criterion: Criterion) -> dict[str, Tensor]:
        loaded = loaded_for(model_case)
        return matrix_scores(loaded.model, loaded.structure.groups, tokens, criterion)

    def matrices(name: str) -> dict[str, Tensor]:
        first_of_model = next(other for other in CASES if CASES[other]["model"] == CASES[name]["model"])
        return gather(first_of_model, fidelity_mode("llm-pruner", name).importance)

    return matrices


@pytest.fixture(scope="module")
def plan_of(
    loaded_for: Callable[[str], LoadedModel], matrices_of: Callable[[str], dict[str, Tensor]], fidelity_mode: Any
) -> Callable[[str], tuple[dict[str, Tensor], KeepPlan]]:
    def plan(name: str) -> tuple[dict[str, Tensor], KeepPlan]:
        method, structure = fidelity_mode("llm-pruner", name), loaded_for(name).structure
        scores = method.combined(matrices_of(name), structure)
        return scores, method.plan_at(scores, structure, CASES[name]["settings"]["pruning_ratio"])

    return plan


@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_published_ones(name: str, plan_of: Any) -> None:
    scores, _ = plan_of(name)
    for kind, figures in (("attention", CASES[name]["kv_head_scores"]), ("mlp", CASES[name]["mlp_channel_scores"])):
        assert figures
        for layer, expected in figures.items():
            found = scores[f"layers.{layer}.{kind}"].double()
            torch.testing.assert_close(
                found, torch.tensor(expected, dtype=torch.float64), rtol=SCORE_TOLERANCE, atol=0, msg=f"{kind} {layer}"
            )


@pytest.mark.parametrize("name", CASES)
def test_kept_units_and_counted_parameters_are_the_published_ones(
    name: str, plan_of: Any, loaded_for: Callable[[str], LoadedModel]
) -> None:
    scores, plan = plan_of(name)
    loaded = loaded_for(name)
    for figures in CASES[name]["layers"]:
        removed = torch.tensor(figures["removed_mlp_channels"], dtype=torch.int64)
        everything = torch.arange(1536)
        assert_same_units(scores, plan, f"layers.{figures['layer']}.mlp", everything[~torch.isin(everything, removed)])
        assert_same_units(scores, plan, f"layers.{figures['layer']}.attention", torch.tensor(figures["kept_kv_heads"]))
    assert loaded.params.total == CASES[name]["params_before"]
    pruned = remove_units(loaded.model, loaded.structure, plan)
    assert count_parameters(pruned.named_parameters()).total == CASES[name]["params_after"]


@pytest.mark.parametrize("name", QUICK_LOSSES)
def test_heldout_loss_is_the_published_one(name: str, plan_of: Any, loaded_for: Any, heldout_loss: Any) -> None:
    loaded = loaded_for(name)
    pruned = remove_units(loaded.model, loaded.structure, plan_of(name)[1])
    assert heldout_loss(pruned) == pytest.approx(CASES[name]["heldout_loss"], abs=LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_LOSSES)
def test_heldout_loss_of_every_other_case_is_the_published_one(
    name: str, plan_of: Any, loaded_for: Any, heldout_loss: Any
) -> None:
    loaded = loaded_for(name)
    pruned = remove_units(loaded.model, loaded.structure, plan_of(name)[1])
    assert heldout_loss(pruned) == pytest.approx(CASES[name]["heldout_loss"], abs=LOSS_TOLERANCE)


def test_crediting_a_query_head_to_the_kv_head_it_leaves_with_changes_which_heads_leave(
    smollm2: LoadedModel, matrices_of: Callable[[str], dict[str, Tensor]], fidelity_mode: Any
) -> None:
    case = "case3_taylor_first_4_25_r25"
    heads = {}
    for fold in ("group", "upstream"):
        method = fidelity_mode("llm-pruner", case, query_fold=fold)
        scores = method.combined(matrices_of(case), smollm2.structure)
        heads[fold] = [int(scores[f"layers.{layer}.attention"].argmin()) for layer in range(4, 26)]
    assert sum(a != b for a, b in zip(heads["group"], heads["upstream"], strict=True)) == 6


def assert_same_units(scores: dict[str, Tensor], plan: KeepPlan, name: str, expected: Tensor) -> None:
    """Equal kept sets; units on the wrong side are few and as good as tied with the unit at the cut."""
    if name not in plan:
        return  # a layer out of range is kept whole
    kept = plan[name]
    assert kept.numel() == expected.numel(), name
    astray = expected[~torch.isin(expected, kept)]
    assert astray.numel() <= 0.005 * expected.numel(), name
    if astray.numel():
        cut = scores[name][kept].min()
        assert float(((scores[name][astray] - cut).abs() / cut).max()) < SCORE_TOLERANCE, name
