"""SliceGPT: rotate the residual stream onto its principal axes and delete the columns that carry least."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from baselines.slicegpt_rotation import SUBLAYERS, Slicer, reoriented
from harness.budget import ParameterTarget, UnreachableSparsityError, unreachable
from harness.method import Footprint, LoadedModel, PrunedModel, ReimplementedMethod
from harness.models import rebuilt
from harness.models.registration import PRUNED_CLASSES
from harness.models.streaming import streamed
from harness.records import ParamCounts
from harness.structure import ModelStructure, count_parameters
from harness.weights import Spool, Weight


class SliceGPT(ReimplementedMethod):
    """Slice every matrix that touches the residual stream to one width d < h.

    The rotation costs two shortcut matrices a layer and a head of its own, so the slicing ratio 1 - d/h is far above
    the sparsity it gives: d is solved from the exact parameter count.
    """

    name: ClassVar[str] = "slicegpt"
    paper: ClassVar[str] = "arXiv:2401.15024"
    published: ClassVar[Mapping[str, JsonValue]] = {
        "slice_head": False,
        "subtract_embedding_mean": True,
        "orientation": "random",
    }
    variants: ClassVar[tuple[Mapping[str, JsonValue], ...]] = (
        {"slice_head": False},
        {"subtract_embedding_mean": True},
        {"orientation": "random"},
        {"pass_dtype": "bfloat16"},
    )
    tolerance: ClassVar[float] = 0.0025  # one column of the residual stream is the finest step

    slice_head: bool = True
    """Slice the head and the last layer's output too.

    Differs: the published default keeps them whole, which at equal size leaves less width for the
    blocks: SmolLM2-135M at 20% of the parameters has a loss of 6.71, and 6.38 with the head sliced.
    """
    orientation: Literal["pca", "random"] = "pca"
    """Axes inside the kept subspace; the function is the same up to rounding.

    Differs: the published default is ``random``; ``pca`` needs no seed, keeps the columns ordered, and loses as much.
    """
    subtract_embedding_mean: bool = False
    """Take each embedding row's mean off, as published.

    Differs: off, because an RMSNorm does not subtract means; on, the loss of SmolLM2-135M rises by 3.7e-4 unsliced
    and by 0.03 at 20%.
    """
    damping: Annotated[float, Field(ge=0)] = 0.01
    """Multiple of the mean diagonal added to the second moments before they are decomposed."""
    pass_dtype: Literal["weights", "bfloat16"] = "weights"
    """Type the blocks compute in while signals are gathered: the weights' own, or bfloat16."""

    def why_unsupported(self, structure: ModelStructure) -> str | None:
        """Models that are already pruned, those without a pruned form, and those that apply a layer more than once."""
        if structure.layer_repeats > 1:
            return (
                f"slicegpt gives every layer's input and output a basis of its own, and each layer of this model is "
                f"applied {structure.layer_repeats} times with the same weights"
            )
        supported = sorted(config.model_type for config in PRUNED_CLASSES)
        if structure.model_type in supported:
            return None
        return f"slicegpt rotates dense models of type {', '.join(supported)}, not {structure.model_type}"

    def working_bytes(self, footprint: Footprint) -> int:
        """A whole new model with its shortcuts, the residual stream of every calibration token, and matrices of h x h.

        The embedding and a matrix on its way into a basis exist in float32 too; second moments and bases in float64.
        """
        h = footprint.structure.hidden_size
        shortcuts = 2 * footprint.structure.num_layers * h * h * footprint.bytes_per_weight
        untied_head = h * footprint.vocab_size * footprint.bytes_per_weight
        stream = footprint.calibration_tokens * h * footprint.bytes_per_weight
        # A streamed model's bases are let go of one after the other.
        in_float64 = 8 * h * h * ((2 if footprint.streamed else 2 * footprint.structure.num_layers) + 4)
        turned = 2 * 4 * h * footprint.vocab_size
        micro_batch = footprint.forward_bytes(2048)
        layers = 0 if footprint.streamed else shortcuts  # in files as soon as they are cut
        return footprint.held_bytes + untied_head + layers + stream + in_float64 + max(turned, micro_batch)

    def prune(
        self, loaded: LoadedModel, calibration: Tensor, targets: Sequence[ParameterTarget], seed: int
    ) -> Iterator[PrunedModel]:
        """One sliced model per target; each needs a pass of its own, for its signals come from sliced blocks."""
        slicer = self.slicer(loaded.model, calibration)
        for target in targets:
            if target.is_rounded:
                raise UnreachableSparsityError(
                    "slicegpt cuts the residual stream to one width, whose single steps are as coarse as the target "
                    "allows; it has no layer widths to round"
                )
            yield self._sliced(loaded, slicer, solve_width(loaded.model, target, self.slice_head), seed)

    def prune_at(self, loaded: LoadedModel, calibration: Tensor, knob: float, seed: int) -> PrunedModel:
        """One model at a slicing ratio, the kept width rounded down to a multiple of 8 as the published code does."""
        width = int((1 - knob) * loaded.structure.hidden_size) // 8 * 8
        return self._sliced(loaded, self.slicer(loaded.model, calibration), width, seed)

    def slicer(self, model: Any, calibration: Tensor) -> Slicer:
        """The model and its tokens [N, T], ready to be cut to any width under these settings."""
        return Slicer(
            model,
            calibration,
            slice_head=self.slice_head,
            subtract_embedding_mean=self.subtract_embedding_mean,
            damping=self.damping,
            bfloat16=self.pass_dtype == "bfloat16",
        )

    def _sliced(self, loaded: LoadedModel, slicer: Slicer, width: int, seed: int) -> PrunedModel:
        # The new model of a streamed one may be as large as that is: every part goes to a file as soon as it is done.
        spool = None if streamed(loaded.model) is None else Spool()
        state: dict[str, Weight] = {}
        explained: list[JsonValue] = []
        parts = slicer.parts(width)
        if self.orientation == "random":
            parts = reoriented(parts, torch.Generator().manual_seed(seed))
        for part in parts:
            state |= part.state if spool is None else spool.put(part.state)
            if part.signal is not None:
                explained.append(part.signal.explained(width))
        knob = {"slicing_ratio": 1 - width / loaded.structure.hidden_size, "residual_size": float(width)}
        return PrunedModel(rebuilt(loaded.model, state), knob, {"explained_variance": explained})


def solve_width(model: Any, target: ParameterTarget, slice_head: bool) -> int:
    """The smallest width whose sliced model has at least the target's parameters.

    There is one for every sparsity above 0: at full width the shortcuts outweigh the norm weights that were fused away.

    Raises:
        UnreachableSparsityError: a single column is still too much.
    """
    widths = range(1, model.config.hidden_size + 1)
    width = widths[bisect_left(widths, 0, key=lambda d: target.excess(sliced_params(model, d, slice_head)))]
    counts = sliced_params(model, width, slice_head)
    if width == 1 and not target.is_met_by(counts, SliceGPT.tolerance):
        raise unreachable(SliceGPT.name, target, target.dense.on(target.basis) - counts.on(target.basis))
    return width


def sliced_params(model: Any, width: int, slice_head: bool) -> ParamCounts:
    """Parameters of a dense model sliced to ``width`` columns, from its shapes alone."""
    shapes = sliced_shapes(model, width, slice_head)
    return count_parameters((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())


def sliced_shapes(model: Any, width: int, slice_head: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a dense model sliced to ``width`` columns."""
    vocab_size, hidden_size = model.get_input_embeddings().weight.shape
    head_width = width if slice_head else hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, width)}
    for i, layer in enumerate(model.model.layers):
        for sublayer in SUBLAYERS:
            is_last = i == len(model.model.layers) - 1 and sublayer is SUBLAYERS[-1]
            output_width = head_width if is_last else width
            for name, tensor in getattr(layer, sublayer.module).named_parameters():
                projection, _, leaf = name.rpartition(".")
                shape = tuple(tensor.shape)
                if projection == sublayer.writer:
                    shape = (output_width, *shape[1:])
                elif projection in sublayer.readers and leaf == "weight":
                    shape = (shape[0], width)
                shapes[f"model.layers.{i}.{sublayer.module}.{name}"] = shape
            shapes[f"model.layers.{i}.{sublayer.shortcut}.weight"] = (output_width, width)
    return shapes | {"lm_head.weight": (vocab_size, head_width)}
