"""One backward pass over the calibration batch that hands out each weight's gradient as it appears, and keeps none.

Nothing is traced and no parameter is touched: every linear map of interest is tapped at its output, where the
gradient of the output and the remembered input give the gradient of the weight. Backward stops at the first tapped
layer, and neither the embedding nor the head gets a gradient.

Shape letters: B samples, T tokens of a sample, N tokens in all, H hidden_size, V vocabulary, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from baselines.importance import TAYLOR, Criterion, Grouping, QueryFold, channel_scores, unit_scores
from baselines.next_token_loss import next_token_loss
from harness.structure import CoupledGroup, ModelStructure

Moments = Literal["gradient", "squared", "both"]
"""What a pass gathers: the gradient of the loss, the mean of the squared per-sample gradients, or both."""

Reducer = Callable[[str, Tensor, Tensor | None, Tensor | None], None]
"""Called once per weight with module name, weight [O, I], gradient [O, I] and squared gradients [O, I] (None where not
asked for); both may be overwritten."""

LayerObserver = Callable[[int, Tensor, Tensor], None]
"""Called in every micro-batch with layer index and the layer's input and output residual stream [B, T, H]."""


def unit_gradient_scores(
    model: Any,
    structure: ModelStructure,
    groups: Sequence[CoupledGroup],
    calibration: Tensor,
    criterion: Criterion,
    *,
    grouping: Grouping = "sum",
    fold: QueryFold = "group",
    mean_over: int | None = None,
    micro_batch_tokens: int = 1024,
    bfloat16: bool = False,
    on_layer: LayerObserver | None = None,
    on_loss: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Scores of the units of ``groups``, from one gradient pass, or from the weights alone for ``l1`` and ``l2``.

    Args:
        model: a causal language model; left as it was.
        structure: its coupled groups.
        groups: those to score; backward stops at the first layer among them.
        calibration: token ids [B, T].
        criterion: see ``importance.channel_scores``.
        grouping: see ``importance.combine_members``.
        fold: see ``importance.fold_query_channels``.
        mean_over: see ``gradient_pass``.
        micro_batch_tokens: see ``gradient_pass``.
        bfloat16: see ``gradient_pass``.
        on_layer: see ``gradient_pass``; not called where no pass is needed.
        on_loss: receives the mean loss; not called where no pass is needed.

    Returns:
        Group name -> score per unit [num_units], on the CPU.
    """
    by_module = matrix_scores(
        model,
        groups,
        calibration,
        criterion,
        mean_over=mean_over,
        micro_batch_tokens=micro_batch_tokens,
        bfloat16=bfloat16,
        on_layer=on_layer,
        on_loss=on_loss,
    )
    shape = {"head_dim": structure.head_dim, "query_group_size": structure.query_group_size}
    return {
        group.name: unit_scores(group, by_module, criterion=criterion, grouping=grouping, fold=fold, **shape)
        for group in groups
    }


def matrix_scores(
    model: Any,
    groups: Sequence[CoupledGroup],
    calibration: Tensor,
    criterion: Criterion,
    *,
    mean_over: int | None = None,
    micro_batch_tokens: int = 1024,
    bfloat16: bool = False,
    on_layer: LayerObserver | None = None,
    on_loss: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Scores of the channels of every matrix of ``groups``, before matrices are combined; as ``unit_gradient_scores``.

    Returns:
        Module name -> score per row or column that belongs to units [C], on the CPU.
    """
    dims = {member.module: member.dim for group in groups if group.num_units for member in group.members}
    by_module: dict[str, Tensor] = {}

    def reduce(module: str, weight: Tensor, gradient: Tensor | None, squared: Tensor | None) -> None:
        by_module[module] = channel_scores(weight, criterion, dims[module], gradient, squared).cpu()

    if criterion not in TAYLOR:
        for module in dims:
            reduce(module, model.get_submodule(module).weight.detach(), None, None)
        return by_module
    moments: dict[str, Moments] = {"param_second": "squared", "param_mix": "both"}
    loss = gradient_pass(
        model,
        calibration,
        tuple(dims),
        reduce,
        moments=moments.get(criterion, "gradient"),
        mean_over=mean_over,
        micro_batch_tokens=micro_batch_tokens,
        bfloat16=bfloat16,
        on_layer=on_layer,
    )
    if on_loss is not None:
        on_loss(loss)
    return by_module


def gradient_pass(
    model: Any,
    calibration: Tensor,
    modules: Sequence[str],
    reduce: Reducer,
    *,
    moments: Moments = "gradient",
    mean_over: int | None = None,
    micro_batch_tokens: int = 1024,
    bfloat16: bool = False,
    on_layer: LayerObserver | None = None,
) -> float:
    """Run forward and backward over the calibration batch and hand each weight's gradient to ``reduce``.

    The gradient is that of the mean next-token loss over all predicted tokens, whatever the micro-batches. The squared
    gradients are the mean over samples of (gradient of that sample's mean loss)^2.

    Args:
        model: a causal language model; left as it was.
        calibration: token ids [B, T], T >= 2, without padding.
        modules: names of the linear maps whose weights' gradients are wanted.
        reduce: receives them; the last micro-batch hands them out, last layer first, and frees each at once.
        moments: which ones.
        mean_over: samples that each mean is taken over; the gradients of consecutive such mini-batches are summed. None
            takes one mean over all samples.
        micro_batch_tokens: most tokens run at once (at least one sample); bounds memory, does not change the result.
        bfloat16: let the matrix products run in bfloat16; sums over micro-batches, samples and channels stay float32.
        on_layer: sees each layer's input and output of this same forward.

    Returns:
        Mean next-token loss over all predicted tokens, in nats.
    """
    num_samples, num_tokens = calibration.shape
    assert num_tokens > 1, "a sequence of one token predicts nothing"
    assert mean_over is None or moments == "gradient", "squared gradients are per sample"
    rows = max(micro_batch_tokens // num_tokens, 1)
    weight_B = _token_weights(num_samples, num_tokens - 1, mean_over).to(calibration.device)
    total_loss = 0.0
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        taps = [stack.enter_context(_tapped(model, name, moments, num_samples)) for name in modules]
        if on_layer is not None:
            stack.enter_context(layers_observed(model, on_layer))
        for start in range(0, num_samples, rows):
            for tap in taps:
                tap.reduce = reduce if start + rows >= num_samples else None
            batch = calibration[start : start + rows]
            total_loss += _forward_backward(model, batch, weight_B[start : start + rows], bfloat16)
    return total_loss / (num_samples * (num_tokens - 1))


def _token_weights(num_samples: int, predicted: int, mean_over: int | None) -> Tensor:
    """What each token of a sample weighs in the loss: one over the tokens of its mini-batch, [B]."""
    size = num_samples if mean_over is None else mean_over
    index = torch.arange(num_samples)
    in_mini_batch = torch.clamp(num_samples - index // size * size, max=size)
    return 1.0 / (in_mini_batch * predicted).double()


def _forward_backward(model: Any, batch_BT: Tensor, weight_B: Tensor, bfloat16: bool) -> float:
    """Backward of the weighted sum of token losses; returns their plain sum."""
    head_VH = model.lm_head.weight.detach()
    with torch.enable_grad():
        with torch.autocast(batch_BT.device.type, torch.bfloat16, enabled=bfloat16):
            hidden = model.model(input_ids=batch_BT, use_cache=False).last_hidden_state
        predicting = hidden[:, :-1].flatten(0, 1).to(torch.bfloat16 if bfloat16 else hidden.dtype)
        weights = weight_B.repeat_interleave(batch_BT.shape[1] - 1)
        targets = batch_BT[:, 1:].flatten()
        loss, plain = next_token_loss(predicting, head_VH.to(predicting.dtype), targets, weights)
    if loss.requires_grad:
        torch.autograd.backward(loss)
    return float(plain)


@dataclass
class _Tap:
    """Gathers the moments of one weight's gradient from the map's inputs and its outputs' gradients."""

    module: str
    linear: nn.Linear
    moments: Moments
    num_samples: int
    reduce: Reducer | None = None
    """Set for the last micro-batch."""
    gradient: Tensor | None = None
    squared: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    """Of the applications in this micro-batch that have no slope yet: one, or as many as the layer is repeated."""
    applications: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Slope and input of those that have one."""

    def on_forward(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Remember the input; ask for the output's gradient, as a leaf where nothing before it needs one."""
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self.inputs.append(args[0].detach())
        output.register_hook(self.on_backward)  # type: ignore[no-untyped-call]
        return output

    def on_backward(self, slope_BTO: Tensor) -> None:
        """Add this micro-batch's gradient, and hand over the sum after the last one.

        A weight that is applied several times has the sum of all its applications' gradients.
        """
        self.applications.append((slope_BTO, self.inputs.pop()))
        if self.inputs:
            return
        if self.moments != "squared":
            for slope, given in self.applications:
                self._add_gradient(slope.flatten(0, -2), given.flatten(0, -2))
        if self.moments != "gradient":
            self._add_squares()
        self.applications.clear()
        if self.reduce is not None:
            self.reduce(self.module, self.linear.weight.detach(), self.gradient, self.squared)
            self.gradient = self.squared = None

    def _add_gradient(self, slope_NO: Tensor, input_NI: Tensor) -> None:
        input_NI = input_NI.to(slope_NO.dtype)  # under autocast a float32 input meets a bfloat16 slope
        if self.gradient is not None and self.gradient.dtype == slope_NO.dtype:
            self.gradient.addmm_(slope_NO.T, input_NI)
            return
        product = (slope_NO.T @ input_NI).to(torch.promote_types(slope_NO.dtype, torch.float32))
        self.gradient = product if self.gradient is None else self.gradient.add_(product)

    def _add_squares(self) -> None:
        dtype = self.applications[0][0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        for b in range(self.applications[0][0].shape[0]):
            # The batch's loss is the mean of the samples' mean losses, so this is 1/B of the sample's own gradient.
            products = [(slope[b].T @ given[b].to(dtype)).to(wide) for slope, given in self.applications]
            sample = products[0]
            for product in products[1:]:
                sample += product
            if self.squared is None:
                self.squared = sample.square_().mul_(self.num_samples)
            else:
                self.squared.addcmul_(sample, sample, value=self.num_samples)


@contextmanager
def _tapped(model: Any, module: str, moments: Moments, num_samples: int) -> Iterator[_Tap]:
    tap = _Tap(module, model.get_submodule(module), moments, num_samples)
    handle = tap.linear.register_forward_hook(tap.on_forward)
    try:
        yield tap
    finally:
        handle.remove()


@contextmanager
def layers_observed(model: Any, on_layer: LayerObserver) -> Iterator[None]:
    """While open, every forward through the model's decoder layers is shown to ``on_layer``."""

    def hook(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            returned = output[0] if isinstance(output, tuple) else output
            with torch.no_grad():
                on_layer(index, given.detach(), returned.detach())

        return observe

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter requires a gradient, so that autograd makes only what flows between the layers."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
