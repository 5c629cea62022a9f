"""SliceGPT on tiny float64 models: against the dense model, and against projections in the dense basis."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from baselines import slicegpt_rotation
from baselines.slicegpt import SliceGPT, sliced_params, sliced_shapes, solve_width
from baselines.slicegpt_rotation import SUBLAYERS, Slicer, fused, principal_axes, random_rotation, reoriented
from harness.budget import ParameterTarget, UnreachableSparsityError
from harness.models import LoadedModel, assemble
from harness.structure import count_parameters

HIDDEN_SIZE = 48
MakeTiny = Callable[..., LoadedModel]


def exact(model: Any) -> Any:
    """A copy whose weighted norms compute in float64 (transformers' compute in float32)."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "weight"):
                norm = nn.RMSNorm(child.weight.numel(), child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def unseen_tokens() -> Tensor:
    return torch.randint(0, 96, (3, 11), generator=torch.Generator().manual_seed(11))


def target(loaded: LoadedModel, sparsity: float, basis: Any = "total") -> ParameterTarget:
    return ParameterTarget(sparsity, basis, loaded.params)


@pytest.mark.parametrize("slice_head", [True, False])
def test_full_width_equals_the_dense_model(tiny: LoadedModel, calibration: Tensor, slice_head: bool) -> None:
    dense = exact(tiny.model)
    rotated = assemble(dense.config, Slicer(dense, calibration, slice_head).to_width(HIDDEN_SIZE).state)
    difference = logits(exact(rotated), unseen_tokens()) - logits(dense, unseen_tokens())
    assert difference.abs().max() < 1e-8


def test_fused_norms_alone_equal_the_dense_model(tiny: LoadedModel) -> None:
    dense = exact(tiny.model)
    state = {name: tensor.detach().clone() for name, tensor in dense.named_parameters()}
    state["lm_head.weight"] = fused(dense.lm_head.weight, dense.model.norm.weight)
    state["model.norm.weight"] = torch.ones(HIDDEN_SIZE, dtype=torch.float64)
    for i, layer in enumerate(dense.model.layers):
        for sublayer in SUBLAYERS:
            prefix = f"model.layers.{i}."
            state[f"{prefix}{sublayer.norm}.weight"] = torch.ones(HIDDEN_SIZE, dtype=torch.float64)
            for reader in (f"{sublayer.module}.{name}.weight" for name in sublayer.readers):
                state[prefix + reader] = fused(state[prefix + reader], getattr(layer, sublayer.norm).weight)
    without_norms = exact(assemble(dense.config, state))
    assert (logits(without_norms, unseen_tokens()) - logits(dense, unseen_tokens())).abs().max() < 1e-10


def projected_forward(dense: Any, tokens: Tensor, projections: list[Tensor], width: int, slice_head: bool) -> Tensor:
    """Logits of the dense model with its residual stream projected after the embedding and after every sublayer.

    Where ``projections`` runs out, the next one is found: onto the leading eigenvectors of the signal's X^T X.
    """
    model, taken = dense.model, iter(list(projections))
    last = 2 * dense.config.num_hidden_layers

    def project(signal: Tensor, place: int) -> Tensor:
        projection = next(taken, None)
        if projection is None:
            rows = signal.flatten(0, 1)
            kept = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -width:]
            projection = torch.eye(HIDDEN_SIZE).double() if place == last and not slice_head else kept @ kept.T
            projections.append(projection)
        return signal @ projection

    positions = torch.arange(tokens.shape[1])[None]
    rotary = model.rotary_emb(model.embed_tokens(tokens), position_ids=positions)
    stream = project(model.embed_tokens(tokens), 0)
    for i, layer in enumerate(model.layers):
        attention, _ = layer.self_attn(layer.input_layernorm(stream), position_embeddings=rotary, attention_mask=None)
        stream = project(stream + attention, 2 * i + 1)
        stream = project(stream + layer.mlp(layer.post_attention_layernorm(stream)), 2 * i + 2)
    return dense.lm_head(model.norm(stream))


@pytest.mark.parametrize("slice_head", [True, False])
def test_slicing_equals_projecting_in_the_dense_basis(tiny: LoadedModel, calibration: Tensor, slice_head: bool) -> None:
    dense, width = exact(tiny.model), 30
    projections: list[Tensor] = []
    with torch.no_grad():
        projected_forward(dense, calibration, projections, width, slice_head)
        expected = projected_forward(dense, unseen_tokens(), projections, width, slice_head)
    sliced = assemble(dense.config, Slicer(dense, calibration, slice_head).to_width(width).state)
    assert len(projections) == 1 + 2 * dense.config.num_hidden_layers
    assert (logits(exact(sliced), unseen_tokens()) - expected).abs().max() < 1e-8
    assert (expected - logits(dense, unseen_tokens())).abs().max() > 1e-3


@pytest.mark.parametrize("slice_head", [True, False])
def test_random_orientation_is_the_same_function_with_other_weights(
    tiny: LoadedModel, calibration: Tensor, slice_head: bool
) -> None:
    parts = list(Slicer(tiny.model, calibration, slice_head).parts(30))
    state, turned = (
        {name: tensor for part in some for name, tensor in part.state.items()}
        for some in (parts, reoriented(parts, torch.Generator().manual_seed(3)))
    )
    straight, random = (exact(assemble(tiny.model.config, weights)) for weights in (state, turned))
    assert (logits(straight, unseen_tokens()) - logits(random, unseen_tokens())).abs().max() < 1e-10
    assert all(turned[name].shape == tensor.shape for name, tensor in state.items())
    assert not torch.allclose(turned["model.embed_tokens.weight"], state["model.embed_tokens.weight"])


def test_random_orientation_follows_the_seed(make_tiny: MakeTiny, calibration: Tensor) -> None:
    loaded = make_tiny("tied")
    method = SliceGPT(orientation="random")

    def embedding(seed: int) -> Tensor:
        (pruned,) = method.prune(loaded, calibration, [target(loaded, 0.3)], seed)
        return pruned.model.model.embed_tokens.weight

    assert torch.equal(embedding(0), embedding(0))
    assert not torch.allclose(embedding(0), embedding(1))


@pytest.mark.parametrize("slice_head", [True, False])
@pytest.mark.parametrize("width", [1, 17, 47, 48])
def test_formula_counts_what_is_there(tiny: LoadedModel, calibration: Tensor, slice_head: bool, width: int) -> None:
    state = Slicer(tiny.model, calibration, slice_head).to_width(width).state
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == sliced_shapes(tiny.model, width, slice_head)
    model = assemble(tiny.model.config, state)
    assert count_parameters(model.named_parameters()) == sliced_params(tiny.model, width, slice_head)


@pytest.mark.parametrize("basis", ["total", "non-embedding"])
@pytest.mark.parametrize("slice_head", [True, False])
def test_width_is_the_smallest_that_does_not_overshoot(tiny: LoadedModel, basis: str, slice_head: bool) -> None:
    for sparsity in (0.001, 0.2, 0.5):
        wanted = target(tiny, sparsity, basis)
        width = solve_width(tiny.model, wanted, slice_head)
        enough = [d for d in range(1, 49) if sliced_params(tiny.model, d, slice_head).on(wanted.basis) >= wanted.params]
        assert width == enough[0]


def test_known_widths_of_the_real_model(smollm2: LoadedModel) -> None:
    # By hand: 60 d^2 + 282,624 d with the head sliced, 59 d^2 + 232,512 d + 29,196,288 with the head kept.
    assert sliced_params(smollm2.model, 354, slice_head=True).total == 107_567_856
    assert sliced_params(smollm2.model, 312, slice_head=False).total == 107_483_328
    for sparsity, sliced_head, whole_head in ((0.2, 355, 313), (0.4, 271, 211)):
        wanted = target(smollm2, sparsity)
        assert solve_width(smollm2.model, wanted, slice_head=True) == sliced_head
        assert solve_width(smollm2.model, wanted, slice_head=False) == whole_head
        assert wanted.is_met_by(sliced_params(smollm2.model, sliced_head, slice_head=True), SliceGPT.tolerance)


def test_one_column_too_many_is_unreachable(make_tiny: MakeTiny, calibration: Tensor) -> None:
    loaded = make_tiny("grouped-query")
    with pytest.raises(UnreachableSparsityError, match=r"slicegpt cannot remove 99\.9% .* largest .* 0\.9\d+"):
        list(SliceGPT().prune(loaded, calibration, [target(loaded, 0.999)], 0))


def test_targets_share_a_pass_and_do_not_touch_each_other(tiny: LoadedModel, calibration: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    targets = [target(tiny, 0.2), target(tiny, 0.4)]
    together = list(SliceGPT().prune(tiny, calibration, targets, 0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    for wanted, pruned in zip(targets, together, strict=True):
        (alone,) = SliceGPT().prune(tiny, calibration, [wanted], 0)
        width = solve_width(tiny.model, wanted, slice_head=True)
        assert pruned.knob == {"slicing_ratio": 1 - width / HIDDEN_SIZE, "residual_size": width}
        for name, tensor in alone.model.state_dict().items():
            assert torch.allclose(pruned.model.state_dict()[name].abs(), tensor.abs(), atol=1e-6)
        assert wanted.excess(count_parameters(pruned.model.named_parameters())) >= 0
        assert len(json.loads(json.dumps(pruned.trace))["explained_variance"]) == 7


def test_saved_model_loads_with_equal_logits(tiny: LoadedModel, calibration: Tensor, tmp_path: Path) -> None:
    (pruned,) = SliceGPT().prune(tiny, calibration, [target(tiny, 0.3)], 0)
    pruned.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded).__name__.startswith("Pruned")
    loaded.tie_weights()
    saved = pruned.model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert len(loaded.state_dict()) == len(saved)
    # Not bit for bit: products depend on how the tensors are aligned in memory.
    assert (logits(loaded, unseen_tokens()) - logits(pruned.model, unseen_tokens())).abs().max() < 1e-6


def test_generation_with_the_cache_equals_generation_without(tiny: LoadedModel, calibration: Tensor) -> None:
    (pruned,) = SliceGPT().prune(tiny, calibration, [target(tiny, 0.3)], 0)
    tokens = unseen_tokens()
    whole = logits(pruned.model, tokens)
    with torch.no_grad():
        first = pruned.model(tokens[:, :5], use_cache=True)
        rest = pruned.model(tokens[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert (torch.cat([first.logits, rest.logits], dim=1) - whole).abs().max() < 1e-6  # q and k norms are float32
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (pruned.model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_micro_batches_do_not_change_the_axes(
    make_tiny: MakeTiny, calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = make_tiny("qwen3")
    whole = Slicer(loaded.model, calibration).to_width(30)
    monkeypatch.setattr(slicegpt_rotation, "MICRO_BATCH_TOKENS", 20)  # one sequence of 16 at a time
    split = Slicer(loaded.model, calibration).to_width(30)
    for one, other in zip(whole.signals, split.signals, strict=True):
        assert torch.allclose(one.energies, other.energies, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", ["grouped-query", "mistral"])
def test_every_attention_implementation_sees_the_causal_mask(
    make_tiny: MakeTiny, calibration: Tensor, shape: str
) -> None:
    model = make_tiny(shape).model
    sdpa = Slicer(model, calibration).to_width(30)
    model.set_attn_implementation("eager")
    eager = Slicer(model, calibration).to_width(30)
    for one, other in zip(sdpa.signals, eager.signals, strict=True):
        assert torch.allclose(one.energies, other.energies, rtol=1e-6, atol=1e-9)


def test_embedding_mean_is_kept_unless_asked_for(make_tiny: MakeTiny, calibration: Tensor) -> None:
    model = make_tiny("tied").model
    assert torch.equal(Slicer(model, calibration).embedding, model.model.embed_tokens.weight)
    without = Slicer(model, calibration, subtract_embedding_mean=True).embedding
    assert without.mean(dim=1).abs().max() < 1e-15
    assert torch.allclose(without.diff(dim=1), model.model.embed_tokens.weight.diff(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sliced_weights_keep_the_model_s_dtype(make_tiny: MakeTiny, calibration: Tensor, dtype: torch.dtype) -> None:
    loaded = make_tiny("biased", dtype)
    (pruned,) = SliceGPT(orientation="random").prune(loaded, calibration, [target(loaded, 0.2)], 0)
    assert {parameter.dtype for parameter in pruned.model.parameters()} == {dtype}
    assert logits(pruned.model, unseen_tokens()).isfinite().all()


def test_axes_fall_by_energy_and_damping_moves_none() -> None:
    moments = torch.diag(torch.tensor([2.0, 8.0, 0.0, 6.0], dtype=torch.float64))
    for damping in (0.0, 0.01, 1.0):
        found = principal_axes(moments, damping)
        assert torch.allclose(found.energies, torch.tensor([8.0, 6.0, 2.0, 0.0], dtype=torch.float64), atol=1e-14)
        assert found.axes.abs().argmax(dim=0).tolist() == [1, 3, 0, 2]
        assert found.explained(2) == pytest.approx(14 / 16)


def test_random_rotation_is_orthogonal() -> None:
    rotation = random_rotation(7, torch.Generator().manual_seed(0))
    assert torch.allclose(rotation.T @ rotation, torch.eye(7, dtype=torch.float64), atol=1e-14)


def test_a_sliced_model_is_not_sliced_again(make_tiny: MakeTiny, calibration: Tensor) -> None:
    loaded = make_tiny("grouped-query")
    assert SliceGPT().why_unsupported(loaded.structure) is None
    (pruned,) = SliceGPT().prune(loaded, calibration, [target(loaded, 0.2)], 0)
    again = LoadedModel(pruned.model, None, "again")
    assert "pruned_llama" in str(SliceGPT().why_unsupported(again.structure))


def test_bfloat16_passes_move_the_axes_little_and_leave_the_weights_dtype(
    make_tiny: MakeTiny, calibration: Tensor
) -> None:
    loaded = make_tiny("grouped-query", torch.float32)
    exact, coarse = (
        SliceGPT(pass_dtype=dtype).slicer(loaded.model, calibration).to_width(24)  # type: ignore[arg-type]
        for dtype in ("weights", "bfloat16")
    )
    assert all(tensor.dtype == torch.float32 for tensor in coarse.state.values())
    for ours, theirs in zip(coarse.signals, exact.signals, strict=True):
        assert ours.explained(24) == pytest.approx(theirs.explained(24), abs=5e-3)
    assert not torch.equal(
        coarse.state["model.layers.1.mlp_shortcut.weight"], exact.state["model.layers.1.mlp_shortcut.weight"]
    )
