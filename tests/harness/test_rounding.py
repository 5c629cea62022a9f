"""Widths that are multiples, or one for all layers, under the same parameter target."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.budget import target_for
from harness.errors import UserError
from harness.models import LoadedModel
from harness.registry import build_method, known_methods
from harness.rounding import rounded
from harness.structure import count_parameters, describe, removed_params

MakeTiny = Callable[..., LoadedModel]
# adapt-accel refuses: units that left cannot come back once training went on without them (test_accel.py).
UNIT_METHODS = [name for name in known_methods() if name not in ("dense", "slicegpt", "adapt-accel")]
ALL_LAYERS = {"llm-pruner": {"first_layer": 0, "last_layer": 2}}


@pytest.mark.parametrize("name", UNIT_METHODS)
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_method_meets_its_target_with_widths_that_are_multiples(
    make_tiny: MakeTiny, calibration: torch.Tensor, name: str, uniform: bool, multiple: int
) -> None:
    loaded = make_tiny("grouped-query")
    target = target_for(0.15, "total", loaded.params, loaded.structure, multiple, uniform)
    method = build_method(name, ALL_LAYERS.get(name, {}))
    pruned = next(method.prune(loaded, calibration, [target], seed=0)).model
    counts, structure = count_parameters(pruned.named_parameters()), describe(pruned)
    assert target.is_met_by(counts, method.tolerance)
    assert all(group.num_units % multiple == 0 for group in structure.mlp)
    if uniform:
        assert len({group.num_units for group in structure.mlp}) == 1
        assert len({group.num_units for group in structure.attention}) == 1
        stock = {"flap": "PrunedLlamaForCausalLM"}.get(name, "LlamaForCausalLM")
        assert type(pruned).__name__ == stock  # FLAP's biases are extras
    assert torch.isfinite(pruned(calibration).logits).all()


@pytest.mark.parametrize(("round_to", "uniform", "sparsity"), [(48, True, 0.2), (80, None, 0.02), (16, True, 0.1)])
def test_steps_too_coarse_for_what_is_to_be_removed_are_refused(
    make_tiny: MakeTiny, round_to: int, uniform: bool | None, sparsity: float
) -> None:
    loaded = make_tiny("grouped-query")
    with pytest.raises(UserError, match=f"with --round-to {round_to}.* too coarse"):
        target_for(sparsity, "non-embedding", loaded.params, loaded.structure, round_to, uniform)


@given(st.integers(0, 2**31), st.sampled_from([2, 7, 16]), st.floats(0.1, 0.5))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rounding_moves_no_width_by_more_than_it_must(
    make_tiny: MakeTiny, seed: int, multiple: int, sparsity: float
) -> None:
    loaded = make_tiny("grouped-query")
    structure = loaded.structure
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.num_units, generator=generator) for g in structure.mlp}
    target = target_for(sparsity, "non-embedding", loaded.params, structure, multiple, None)
    channels = target.to_remove // structure.mlp[0].unit_params
    share = torch.rand(3, generator=generator)
    per_layer = [min(int(channels * s / share.sum()), 60) for s in share]
    plan = {g.name: torch.arange(n, g.num_units) for g, n in zip(structure.mlp, per_layer, strict=True)}
    result = rounded(plan, structure, scores, target)
    assert removed_params(structure, result) <= target.to_remove
    for group in structure.mlp:
        width = result[group.name].numel()
        assert width % multiple == 0 or width == group.num_units
        assert bool((result[group.name].diff() > 0).all())
        kept = plan[group.name]
        smaller, larger = (result[group.name], kept) if width <= kept.numel() else (kept, result[group.name])
        assert bool(torch.isin(smaller, larger).all())


def test_one_width_for_all_needs_every_layer_to_take_part(make_tiny: MakeTiny, calibration: torch.Tensor) -> None:
    loaded = make_tiny("grouped-query")
    target = target_for(0.1, "total", loaded.params, loaded.structure, None, True)
    method = build_method("llm-pruner", {"first_layer": 1, "last_layer": 2})
    with pytest.raises(UserError, match=r"leaves layers\.0\.attention whole"):
        next(method.prune(loaded, calibration, [target], seed=0))
    with pytest.raises(UserError, match="it has no layer widths to round"):
        next(build_method("slicegpt").prune(loaded, calibration, [target], seed=0))
