"""LLM-Pruner on tiny models: its range of layers, its ratio, and that slicing is masking."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from baselines.gradients import unit_gradient_scores
from baselines.llm_pruner import LLMPruner
from harness.budget import ParameterTarget, UnreachableSparsityError
from harness.errors import UserError
from harness.method import PrunedModel
from harness.models import LoadedModel, assemble, remove_units
from harness.structure import KeepPlan, describe, layer_widths


def target(loaded: LoadedModel, sparsity: float) -> ParameterTarget:
    return ParameterTarget(sparsity, "total", loaded.params)


def pruned(method: LLMPruner, loaded: LoadedModel, calibration: Tensor, *sparsities: float) -> list[PrunedModel]:
    return list(method.prune(loaded, calibration, [target(loaded, s) for s in sparsities], 0))


def masked(loaded: LoadedModel, plan: KeepPlan) -> Any:
    """The dense model with the output columns of every removed unit set to zero."""
    model = copy.deepcopy(loaded.model)
    for name, kept in plan.items():
        (member,) = (m for m in loaded.structure.by_name[name].members if m.dim == 1)
        weight = model.get_submodule(member.module).weight
        mask = torch.zeros(weight.shape[1], dtype=weight.dtype)
        mask[member.positions(kept)] = 1
        weight.mul_(mask)
    return model


@pytest.mark.parametrize(("depth", "expected"), [(32, (4, 29)), (30, (4, 27)), (16, (2, 14)), (3, (0, 2)), (1, (0, 0))])
def test_the_published_range_is_scaled_to_the_depth(
    make_tiny: Callable[..., LoadedModel], depth: int, expected: tuple[int, int]
) -> None:
    structure = replace(make_tiny("tied").structure, num_layers=depth)
    assert LLMPruner().layer_range(structure) == expected


def test_layers_out_of_range_stay_whole_and_the_others_lose_alike(tiny: LoadedModel, calibration: Tensor) -> None:
    (model,) = pruned(LLMPruner(first_layer=1, last_layer=1), tiny, calibration, 0.1)
    dense, widths = layer_widths(tiny.structure), layer_widths(describe(model.model))
    assert (widths[0], widths[2]) == (dense[0], dense[2])
    assert widths[1].intermediate_size < dense[1].intermediate_size
    (model,) = pruned(LLMPruner(), tiny, calibration, 0.1)
    channels = [layer.intermediate_size for layer in layer_widths(describe(model.model))]
    assert max(channels) - min(channels) <= 1


def test_a_range_outside_the_model_is_refused(tiny: LoadedModel, calibration: Tensor) -> None:
    for method in (LLMPruner(last_layer=3), LLMPruner(first_layer=2, last_layer=1)):
        assert method.why_unsupported(tiny.structure) is not None
        with pytest.raises(UserError, match=r"layers 0\.\.2; set first_layer and last_layer inside it"):
            pruned(method, tiny, calibration, 0.1)
    with pytest.raises(ValidationError):
        LLMPruner(first_layer=-1)


@pytest.mark.parametrize("ranking", ["per_layer", "global"])
def test_slicing_equals_masking(tiny: LoadedModel, calibration: Tensor, ranking: Any) -> None:
    method = LLMPruner(ranking=ranking)
    scores = method.scores(tiny, calibration)
    plan = method.plan_at(scores, tiny.structure, 0.55)
    if ranking == "per_layer":  # where raw scores compete, heads are sums over channels and stay longest
        assert all(plan[group.name].numel() < group.num_units for group in tiny.structure.attention)
    sliced = remove_units(tiny.model, tiny.structure, plan)
    torch.testing.assert_close(sliced(calibration).logits, masked(tiny, plan)(calibration).logits, rtol=1e-6, atol=1e-8)


def test_scores_do_not_depend_on_which_other_layers_are_pruned(tiny: LoadedModel, calibration: Tensor) -> None:
    everything = LLMPruner(first_layer=0, last_layer=2).scores(tiny, calibration)
    for name, scores in LLMPruner(first_layer=2, last_layer=2).scores(tiny, calibration).items():
        torch.testing.assert_close(scores, everything[name])


@pytest.mark.parametrize("importance", ["param_first", "param_second", "param_mix", "vectorize", "l1", "l2"])
def test_permuting_channels_and_heads_permutes_the_plan(
    make_tiny: Callable[..., LoadedModel], calibration: Tensor, importance: Any
) -> None:
    loaded = make_tiny("grouped-query")
    generator = torch.Generator().manual_seed(5)
    order = {g.name: torch.randperm(g.num_units, generator=generator) for g in loaded.structure.groups}
    state = dict(loaded.model.named_parameters())
    for group in loaded.structure.groups:
        for member in group.members:
            name = f"{member.module}.weight"
            state[name] = state[name].index_select(member.dim, member.positions(order[group.name]))
    permuted = LoadedModel(assemble(loaded.model.config, state), None, "permuted")
    method = LLMPruner(importance=importance)
    plan, other = (method.plan_at(method.scores(m, calibration), m.structure, 0.6) for m in (loaded, permuted))
    for name, kept in other.items():
        assert torch.equal(order[name][kept].sort().values, plan[name])


def test_one_pass_serves_all_targets_and_reports_its_knob(tiny: LoadedModel, calibration: Tensor) -> None:
    passes = []
    handle = tiny.model.model.register_forward_hook(lambda *_: passes.append(1))
    models = pruned(LLMPruner(), tiny, calibration, 0.05, 0.1, 0.2)
    handle.remove()
    assert len(passes) == 1
    ratios = [model.knob["pruning_ratio"] for model in models]
    assert 0 < ratios[0] < ratios[1] < ratios[2] < 1
    assert all(0 <= model.knob["last_stretch_share"] < 1 for model in models)


def test_an_unreachable_target_is_refused_with_the_largest_one(tiny: LoadedModel, calibration: Tensor) -> None:
    with pytest.raises(UnreachableSparsityError, match=r"llm-pruner cannot remove 90\.0%"):
        pruned(LLMPruner(), tiny, calibration, 0.9)


def test_the_settings_reach_the_scores(make_tiny: Callable[..., LoadedModel], calibration: Tensor) -> None:
    loaded = make_tiny("grouped-query")
    for changes in ({"importance": "param_mix"}, {"grouping": "max"}, {"query_fold": "upstream"}):
        method = LLMPruner(**changes)
        expected = unit_gradient_scores(
            loaded.model,
            loaded.structure,
            loaded.structure.groups,
            calibration,
            method.importance,
            grouping=method.grouping,
            fold=method.query_fold,
        )
        found = method.scores(loaded, calibration)
        default = LLMPruner().scores(loaded, calibration)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any(not torch.equal(found[name], default[name]) for name in expected)
