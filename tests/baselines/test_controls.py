"""The controls: dense, random and magnitude."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baselines.dense import Dense
from baselines.magnitude import Magnitude
from baselines.random_control import Random
from harness.budget import ParameterTarget, UnreachableSparsityError
from harness.method import PruningMethod
from harness.models import LoadedModel
from harness.structure import count_parameters, describe, layer_widths


def weights(method: PruningMethod, loaded: LoadedModel, calibration: Tensor, seed: int) -> list[Tensor]:
    (pruned,) = method.prune(loaded, calibration, [ParameterTarget(0.2, "total", loaded.params)], seed)
    return list(pruned.model.parameters())


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_dense_is_the_model_itself_and_refuses_to_be_smaller(tiny: LoadedModel, calibration: Tensor) -> None:
    whole, smaller = (ParameterTarget(sparsity, "total", tiny.params) for sparsity in (0.0, 0.1))
    (answer,) = Dense().prune(tiny, calibration, [whole], 0)
    assert answer.model is tiny.model
    with pytest.raises(UnreachableSparsityError, match=r"dense cannot remove 10\.0%.*it reaches is 0\.000"):
        next(Dense().prune(tiny, calibration, [smaller], 0))


def test_the_seed_alone_decides_what_leaves_at_random(tiny: LoadedModel, calibration: Tensor) -> None:
    one = weights(Random(), tiny, calibration, 1)
    assert equal(one, weights(Random(), tiny, calibration.flip(0), 1))
    assert not equal(one, weights(Random(), tiny, calibration, 2))


def test_random_scores_do_not_touch_the_global_generator(tiny: LoadedModel) -> None:
    before = torch.get_rng_state()
    Random().scores(tiny.structure, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_magnitude_is_the_norm_of_all_weights_that_leave_with_a_unit(tiny: LoadedModel) -> None:
    scores = Magnitude().scores(tiny.model, tiny.structure)
    for group in tiny.structure.groups:
        for unit in range(group.num_units):
            slices = [
                tiny.model.get_submodule(m.module).weight.index_select(m.dim, m.positions(torch.tensor([unit])))
                for m in group.members
            ]
            expected = torch.cat([part.flatten() for part in slices]).norm()
            assert float(scores[group.name][unit]) == pytest.approx(float(expected))


@pytest.mark.parametrize("method", [Random(), Magnitude()], ids=["random", "magnitude"])
def test_every_layer_loses_the_same_ratio(method: PruningMethod, tiny: LoadedModel, calibration: Tensor) -> None:
    targets = [ParameterTarget(sparsity, "total", tiny.params) for sparsity in (0.1, 0.25)]
    for target, pruned in zip(targets, method.prune(tiny, calibration, targets, 0), strict=True):
        widths = layer_widths(describe(pruned.model))
        assert len({layer.num_key_value_heads for layer in widths}) == 1
        assert max(w.intermediate_size for w in widths) - min(w.intermediate_size for w in widths) <= 1
        excess = target.excess(count_parameters(pruned.model.named_parameters()))
        assert 0 <= excess < tiny.structure.mlp[0].unit_params
