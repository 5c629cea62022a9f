"""What every method in the registry promises, on every tiny model it supports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.budget import ParameterTarget
from harness.method import PrunedModel, PruningMethod
from harness.models import LoadedModel, assemble
from harness.models.saving import save_model
from harness.records import Basis
from harness.registry import build_method, known_methods
from harness.structure import count_parameters, describe

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
COMPETITORS = [name for name in known_methods() if name != "dense"]
# Of the tiny models the embeddings are a fifth to a third, and LLM-Pruner leaves the outer layers alone.
SPARSITIES = (0.05, 0.15)
# One step of SliceGPT's width is a larger share of a model with hidden size 48.
TINY_TOLERANCE = {"slicegpt": 0.04}


def prune(
    method: PruningMethod,
    loaded: LoadedModel,
    calibration: torch.Tensor,
    sparsities: tuple[float, ...] = SPARSITIES,
    basis: Basis = "total",
    seed: int = 0,
) -> list[PrunedModel]:
    if (reason := method.why_unsupported(loaded.structure)) is not None:
        pytest.skip(reason)
    targets = [ParameterTarget(s, basis, loaded.params) for s in sparsities]
    return list(method.prune(loaded, calibration, targets, seed))


@pytest.fixture
def tiny(any_tiny: LoadedModel) -> LoadedModel:
    """Layers that are applied twice are scored and pruned too."""
    return any_tiny


@pytest.fixture(params=COMPETITORS)
def method(request: pytest.FixtureRequest) -> PruningMethod:
    return build_method(request.param)


@pytest.mark.parametrize("basis", ["total", "non-embedding"])
def test_counted_parameters_meet_the_target(
    method: PruningMethod, tiny: LoadedModel, calibration: torch.Tensor, basis: Basis
) -> None:
    channel = 3 * tiny.structure.hidden_size + 2
    for sparsity, pruned in zip(SPARSITIES, prune(method, tiny, calibration, basis=basis), strict=True):
        target = ParameterTarget(sparsity, basis, tiny.params)
        excess = target.excess(count_parameters(pruned.model.named_parameters()))
        assert 0 <= excess < max(channel, TINY_TOLERANCE.get(method.name, 0) * tiny.params.total)


def test_logits_are_finite_and_the_model_given_is_untouched(
    method: PruningMethod, tiny: LoadedModel, calibration: torch.Tensor
) -> None:
    before = {name: p.clone() for name, p in tiny.model.named_parameters()}
    for pruned in prune(method, tiny, calibration):
        assert torch.isfinite(pruned.model(calibration).logits).all()
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad
    assert not any(module._forward_hooks for module in tiny.model.modules())


def test_the_same_seed_gives_the_same_weights(
    method: PruningMethod, tiny: LoadedModel, calibration: torch.Tensor
) -> None:
    first, second = (prune(method, tiny, calibration, seed=3)[-1].model.state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_target_gives_the_same_model_whatever_else_was_asked(
    method: PruningMethod, tiny: LoadedModel, calibration: torch.Tensor
) -> None:
    together = prune(method, tiny, calibration)[-1].model(calibration).logits
    alone = prune(method, tiny, calibration, sparsities=SPARSITIES[-1:])[-1].model(calibration).logits
    assert torch.equal(together, alone)


def test_configuration_agrees_with_weights_and_survives_save_and_load(
    method: PruningMethod, tiny: LoadedModel, calibration: torch.Tensor, tmp_path: Path
) -> None:
    pruned = prune(method, tiny, calibration)[-1].model
    save_model(pruned, None, tmp_path / "model", "card")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(calibration).logits, pruned(calibration).logits)
    assert count_parameters(loaded.named_parameters()) == count_parameters(pruned.named_parameters())


def test_more_sparsity_keeps_no_more_units(method: PruningMethod, tiny: LoadedModel, calibration: torch.Tensor) -> None:
    small, large = (describe(p.model) for p in prune(method, tiny, calibration))
    for less, more in zip(small.groups, large.groups, strict=True):
        assert more.num_units <= less.num_units


def test_a_hopeless_target_names_the_largest_sparsity(
    method: PruningMethod, tiny: LoadedModel, calibration: torch.Tensor
) -> None:
    from harness.budget import UnreachableSparsityError

    with pytest.raises(UnreachableSparsityError, match=r"the largest sparsity it reaches is 0\.\d+"):
        prune(method, tiny, calibration, sparsities=(0.999,))


def test_every_hyper_parameter_is_explained(method: PruningMethod) -> None:
    assert method.paper
    assert all(field.description for field in type(method).model_fields.values())


UNIT_METHODS = ["magnitude", "llm-pruner", "flap", "adapt-pruner"]


def reordered(loaded: LoadedModel, order: dict[str, torch.Tensor]) -> LoadedModel:
    """The same function with the units of every group in another order."""
    state = dict(loaded.model.named_parameters())
    for group in loaded.structure.groups:
        for member in group.members:
            for leaf in ("weight", "bias"):
                name = f"{member.module}.{leaf}"
                if name in state and (leaf == "weight" or member.dim == 0):
                    state[name] = state[name].index_select(member.dim, member.positions(order[group.name]))
    return LoadedModel(assemble(loaded.model.config, state), None, "reordered")


@pytest.mark.parametrize("name", UNIT_METHODS)
def test_reordering_units_reorders_what_is_kept(name: str, tiny: LoadedModel, calibration: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    order = {g.name: torch.randperm(g.num_units, generator=generator) for g in tiny.structure.groups}
    (ours,) = prune(build_method(name), tiny, calibration, (0.15,))
    (other,) = prune(build_method(name), reordered(tiny, order), calibration, (0.15,))
    assert ours.kept is not None
    assert other.kept is not None
    for group, kept in other.kept.items():
        assert torch.equal(order[group][kept].sort().values, ours.kept[group]), group


@pytest.mark.parametrize("name", [*UNIT_METHODS, "random"])
def test_what_is_kept_is_what_the_model_holds(name: str, tiny: LoadedModel, calibration: torch.Tensor) -> None:
    for pruned in prune(build_method(name), tiny, calibration):
        assert pruned.kept is not None
        widths = {group.name: group.num_units for group in describe(pruned.model).groups}
        whole = {group.name: group.num_units for group in tiny.structure.groups}
        assert widths == whole | {group: kept.numel() for group, kept in pruned.kept.items()}
