"""SliceGPT's maths: the residual stream's principal axes, block by block, and weights rotated into them and cut.

Legend: N calibration sequences, T tokens, h hidden size, d kept width. Q is the basis of the residual stream at some
point, [h, h], its columns by falling variance; a stream "in Q" holds coordinates, of which the first d are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from harness.models import state_of
from harness.models.modeling_pruned import SlicedRMSNorm
from harness.models.streaming import streamed
from harness.weights import VOCABULARY_ROWS, Weight, read

MICRO_BATCH_TOKENS = 2048
"""Tokens run through a block at once: bounds the MLP's activations, the largest there are."""
MOMENTS_BLOCK = 128
"""Rows of second moments computed at once, up to the diagonal: two thirds of the time of the whole square."""


@dataclass(frozen=True, slots=True)
class Sublayer:
    """Half of a decoder layer: linear maps that read the residual stream through a norm, and the one that writes."""

    module: str
    norm: str
    readers: tuple[str, ...]
    writer: str
    shortcut: str


SUBLAYERS = (
    Sublayer("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj", "attn_shortcut"),
    Sublayer("mlp", "post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj", "mlp_shortcut"),
)


@dataclass(frozen=True, slots=True)
class PrincipalAxes:
    """Eigenvectors of a signal's second moments, by falling eigenvalue."""

    axes: Tensor
    """Columns, float64 [h, h]."""
    energies: Tensor
    """Eigenvalues: the signal's summed squares along each axis, without damping, float64 [h]."""

    def explained(self, width: int) -> float:
        """Share of the signal's energy that its first ``width`` axes carry."""
        return float(self.energies[:width].sum() / self.energies.sum())


@dataclass(frozen=True, slots=True)
class SlicedPart:
    """What one step through the model gives: the embedding, a sublayer, or at last the head."""

    state: dict[str, Tensor]
    """Its parameters by their names in the model."""
    signal: PrincipalAxes | None = None
    """Of its output, in the coordinates of the signal before; the head has none."""
    sublayer: Sublayer | None = None
    """None for the embedding and the head."""
    prefix: str = ""
    """Of the sublayer's layer, such as ``model.layers.3.``."""


@dataclass(frozen=True, slots=True)
class SlicedWeights:
    """A model cut to one width."""

    state: dict[str, Tensor]
    """Parameters by name, for ``harness.models.assemble``."""
    signals: list[PrincipalAxes]
    """Of the embedding's output, then of every sublayer's output (each in the coordinates of the one before)."""


def principal_axes(moments: Tensor, damping: float) -> PrincipalAxes:
    """Eigenvectors of damped second moments.

    Args:
        moments: X^T X, float64 [h, h], of which the lower triangle is read; neither centred nor divided by the number
            of tokens.
        damping: multiple of the mean diagonal that is added to the diagonal; it moves no axis.

    Source: SliceGPT (arXiv:2401.15024), section 3.3; the damping is the published code's.
    """
    shift = damping * moments.diagonal().mean()
    damped = moments + torch.diag(shift.expand(len(moments)))
    energies, axes = torch.linalg.eigh(damped, UPLO="L")
    return PrincipalAxes(axes.flip(1), energies.flip(0) - shift)


def fused(weight: Tensor, norm: Tensor) -> Tensor:
    """The linear map [out, h] that reads a weightless norm as ``weight`` reads one of weight ``norm`` [h].

    At least float32.

    Source: SliceGPT (arXiv:2401.15024), section 3.2.
    Differs: one product rounded once has the same bits as the published detour through float64.
    """
    precise = _precise(weight.dtype)
    return weight.to(precise) * norm.to(precise)


@dataclass(frozen=True)
class Slicer:
    """A dense model and its calibration tokens, to be cut to any width; what no width changes is computed once."""

    model: Any
    calibration: Tensor
    """Token ids without padding, int64 [N, T]."""
    slice_head: bool = True
    subtract_embedding_mean: bool = False
    damping: float = 0.01
    bfloat16: bool = False
    """Let the blocks' matrix products run in bfloat16; the stream and its second moments stay as they are."""

    def to_width(self, width: int) -> SlicedWeights:
        """All ``parts`` at once."""
        parts = list(self.parts(width))
        state = {name: tensor for part in parts for name, tensor in part.state.items()}
        return SlicedWeights(state, [part.signal for part in parts if part.signal is not None])

    @torch.no_grad()
    def parts(self, width: int) -> Iterator[SlicedPart]:
        """Cut the residual stream to ``width`` columns, front to back: a block sees the outputs of cut ones.

        The published code runs a block twice, once before and once after its attention output is cut. Here every
        block runs once: in the basis Q of a sublayer's input its output's signal is s = [u, 0] + f(norm u), with u the
        kept coordinates of the input, and cutting that signal is a projection of s, whatever f was.

        Source: SliceGPT (arXiv:2401.15024), sections 3.3 and 3.4.
        """
        whole = self.model.config.hidden_size
        stream = _Stream(self, width)
        yield SlicedPart({"model.embed_tokens.weight": stream.embedding}, self.embedding_axes)
        last = (self.model.config.num_hidden_layers - 1, SUBLAYERS[-1])
        for i, sublayer in product(range(self.model.config.num_hidden_layers), SUBLAYERS):
            output_width = whole if (i, sublayer) == last and not self.slice_head else width
            yield stream.advance(i, sublayer, output_width)
        head, norm = self.model.lm_head.weight, self.model.model.norm.weight
        yield SlicedPart({"lm_head.weight": _rows_right(head, stream.basis[:, :output_width], norm)})

    @cached_property
    def dense(self) -> dict[str, Weight]:
        """Parameters of the dense model by name."""
        return state_of(self.model)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Blocks compute in it."""
        how = streamed(self.model)
        return self.embedding.dtype if how is None else how.dtype

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """The dense parameters whose names begin with ``prefix``, by the rest of their names, as stored."""
        device = self.embedding.device
        found = {name.removeprefix(prefix): weight for name, weight in self.dense.items() if name.startswith(prefix)}
        return {name: read(weight).detach().to(device) for name, weight in found.items()}

    @cached_property
    def embedding(self) -> Tensor:
        """Token embeddings [vocab_size, h]; with ``subtract_embedding_mean`` each row's mean is taken off.

        Differs: the mean belongs to the fusion of a LayerNorm. The published code subtracts it for RMSNorm models too,
        which costs SmolLM2-135M 3.7e-4 nats per token.
        """
        weight: Tensor = self.model.model.embed_tokens.weight.detach()
        if not self.subtract_embedding_mean:
            return weight
        precise = weight.double()
        return (precise - precise.mean(dim=1, keepdim=True)).to(weight.dtype)

    @cached_property
    def embedding_axes(self) -> PrincipalAxes:
        """Principal axes of the embedded calibration tokens."""
        hidden_size = self.embedding.shape[1]
        moments = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=self.embedding.device)
        for tokens in self.micro_batches:
            _add_moments(moments, functional.embedding(tokens, self.embedding))
        return principal_axes(moments, self.damping)

    @cached_property
    def micro_batches(self) -> tuple[Tensor, ...]:
        """The calibration tokens on the model's device, [n, T] each."""
        rows = max(1, MICRO_BATCH_TOKENS // self.calibration.shape[1])
        return torch.split(self.calibration.to(self.embedding.device), rows)

    @cached_property
    def attention_arguments(self) -> list[dict[str, Any]]:
        """What each attention is called with beside its input (rotary embedding, mask), by layer.

        Caught while the model runs one sequence: no sequence is padded, so they are the same for all.
        """
        caught: list[dict[str, Any]] = []

        def catch(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

        hooks = [
            layer.self_attn.register_forward_pre_hook(catch, with_kwargs=True) for layer in self.model.model.layers
        ]
        try:
            self.model.model(self.micro_batches[0][:1], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return caught


class _Stream:
    """The residual stream of all calibration tokens, taken through one sublayer after the other while it is cut."""

    def __init__(self, slicer: Slicer, width: int) -> None:
        self.slicer = slicer
        self.width = width
        self.basis = slicer.embedding_axes.axes
        """Q, float64 [h, h]."""
        self.embedding = _rows_right(slicer.embedding, self.basis[:, :width])
        self.hidden = [functional.embedding(t, self.embedding).to(slicer.dtype) for t in slicer.micro_batches]
        """Coordinates in the kept columns of ``basis``, [n, T, d] a micro-batch."""

    def advance(self, layer_idx: int, sublayer: Sublayer, output_width: int) -> SlicedPart:
        """Pass a sublayer: its cut parameters, the shortcut among them, and its signal's axes."""
        prefix = f"model.layers.{layer_idx}."
        dense = self.slicer.weights(f"{prefix}{sublayer.module}.")
        norm = self.slicer.weights(f"{prefix}{sublayer.norm}.")["weight"]
        cut = dict(dense)
        for reader in (f"{name}.weight" for name in sublayer.readers):
            cut[reader] = _right(fused(dense[reader], norm), self.basis[:, : self.width]).to(dense[reader].dtype)
        axes = self._run(layer_idx, sublayer, cut | _rotated(dense, sublayer.writer, self.basis))
        cut |= _rotated(dense, sublayer.writer, self.basis[:, :output_width])
        shortcut = axes.axes[: self.width, :output_width].T.contiguous()
        tensors = {f"{prefix}{sublayer.module}.{name}": tensor for name, tensor in cut.items()}
        tensors[f"{prefix}{sublayer.shortcut}.weight"] = shortcut.to(self.embedding.dtype)
        return SlicedPart(tensors, axes, sublayer, prefix)

    def _run(self, layer_idx: int, sublayer: Sublayer, parameters: dict[str, Tensor]) -> PrincipalAxes:
        """Run a sublayer whose output is not cut yet; turn the stream into the axes of that signal and cut it."""
        config = self.slicer.model.config
        norm = SlicedRMSNorm(config.hidden_size, config.rms_norm_eps)
        module = getattr(self.slicer.model.model.layers[layer_idx], sublayer.module)
        arguments = self.slicer.attention_arguments[layer_idx] if sublayer.module == "self_attn" else {}
        parameters = {name: tensor.to(self.slicer.dtype) for name, tensor in parameters.items()}
        moments = torch.zeros_like(self.basis)
        for i, hidden in enumerate(self.hidden):
            with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.slicer.bfloat16):
                output = functional_call(module, parameters, (norm(hidden),), arguments)
            signal = (output[0] if isinstance(output, tuple) else output).to(hidden.dtype)
            signal[..., : self.width] += hidden
            _add_moments(moments, signal)
            self.hidden[i] = signal
        axes = principal_axes(moments, self.slicer.damping)
        kept = axes.axes[:, : self.width].to(self.slicer.dtype)
        for i, signal in enumerate(self.hidden):
            self.hidden[i] = signal @ kept
        self.basis = self.basis @ axes.axes
        return axes


def reoriented(parts: Iterable[SlicedPart], generator: torch.Generator) -> Iterator[SlicedPart]:
    """The same function with a random rotation inside every kept subspace in place of the principal axes.

    Args:
        parts: of ``Slicer``, in their order; not changed.
        generator: on the CPU.

    Source: the published code's default; it spreads the energy evenly over the columns.
    Differs: applied to the finished weights, so the signals that the axes come from see no rounding of it.
    """
    before = torch.empty(0)
    for part in parts:
        turned = dict(part.state)
        if part.sublayer is not None:
            shortcut = f"{part.prefix}{part.sublayer.shortcut}.weight"
            after = random_rotation(len(turned[shortcut]), generator)
            for reader in (f"{part.prefix}{part.sublayer.module}.{name}.weight" for name in part.sublayer.readers):
                turned[reader] = _right(turned[reader], before)
            turned |= _rotated(turned, f"{part.prefix}{part.sublayer.module}.{part.sublayer.writer}", after)
            turned[shortcut] = _right(_left(after, turned[shortcut]), before)
            before = after
        else:
            (name,) = turned
            if name == "model.embed_tokens.weight":
                before = random_rotation(turned[name].shape[1], generator)
            turned[name] = _right(turned[name], before)
        yield replace(part, state={name: tensor.to(part.state[name].dtype) for name, tensor in turned.items()})


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix drawn uniformly (Haar), float64 [size, size]."""
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    # Without the signs, the draw would follow the sign convention of the QR routine.
    rotation: Tensor = Q * R.diagonal().sign()
    return rotation


def _rotated(parameters: dict[str, Tensor], writer: str, basis: Tensor) -> dict[str, Tensor]:
    """Weight and bias of a map into the dense basis, [h, in] and [h], made to write coordinates in ``basis`` [h, k]."""
    names = [name for name in (f"{writer}.weight", f"{writer}.bias") if name in parameters]
    return {name: _left(basis, parameters[name]).to(parameters[name].dtype) for name in names}


def _left(basis: Tensor, tensor: Tensor) -> Tensor:
    """``basis``^T times ``tensor``, at least in float32."""
    precise = _precise(tensor.dtype)
    turned: Tensor = basis.T.to(tensor.device, precise) @ tensor.to(precise)
    return turned


def _right(tensor: Tensor, basis: Tensor) -> Tensor:
    """``tensor`` times ``basis``, at least in float32."""
    precise = _precise(tensor.dtype)
    return tensor.to(precise) @ basis.to(tensor.device, precise)


def _rows_right(weight: Tensor, basis: Tensor, norm: Tensor | None = None) -> Tensor:
    """A matrix of a row per token times ``basis``, fused with a norm first or not, in the matrix's own dtype.

    Some rows at a time, so that nothing of the vocabulary's size exists in float32.
    """
    parts = torch.split(weight.detach(), VOCABULARY_ROWS)
    return torch.cat([_right(part if norm is None else fused(part, norm), basis).to(weight.dtype) for part in parts])


def _add_moments(moments: Tensor, signal: Tensor) -> None:
    """Add X^T X of ``signal`` [..., h] to the lower triangle of ``moments`` [h, h] in place."""
    # In float64: beside SmolLM2's massive activations, which carry 1e8 times the energy of the smallest direction,
    # float32 products move the later eigenvalues by 2e-3 and the held-out loss by 2e-3.
    rows = signal.flatten(0, -2).double()
    for start in range(0, len(moments), MOMENTS_BLOCK):
        block = slice(start, start + MOMENTS_BLOCK)
        moments[block, : block.stop] += rows[:, block].T @ rows[:, : block.stop]


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
