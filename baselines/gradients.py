"""One backward pass over the calibration batch that hands out each weight's gradient as it appears, and keeps none.

Nothing is traced and no parameter is touched: every linear map of interest is tapped at its output, where the
gradient of the output and the remembered input give the gradient of the weight. Backward stops at the first tapped
layer, and neither the embedding nor the head gets a gradient.

The layers of a streamed model are taken one at a time (``layerwise``).

Shape letters: B samples, T tokens of a sample, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from baselines.importance import TAYLOR, Criterion, Grouping, QueryFold, channel_scores, unit_scores
from baselines.layerwise import layerwise_pass
from baselines.taps import Gathering, LayerObserver, Moments, Reducer, layers_observed, tapped
from harness.models import micro_batch_rows, weight_of
from harness.models.streaming import streamed
from harness.structure import CoupledGroup, ModelStructure
from harness.token_loss import batch_loss


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
            reduce(module, weight_of(model, module), None, None)
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
    weight_B = _token_weights(num_samples, num_tokens - 1, mean_over).to(calibration.device)
    rows = micro_batch_rows(model, num_tokens, micro_batch_tokens)
    gathering = Gathering(modules, reduce, moments, rows, bfloat16, on_layer)
    run = _whole_pass if streamed(model) is None else layerwise_pass
    return run(model, calibration, weight_B, gathering) / (num_samples * (num_tokens - 1))


def _whole_pass(model: Any, calibration: Tensor, weight_B: Tensor, gathering: Gathering) -> float:
    """All layers forward, then all backward, one micro-batch after the other; returns the sum of token losses."""
    num_samples = calibration.shape[0]
    total_loss = 0.0
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        taps = [stack.enter_context(tapped(model, m, gathering.moments, num_samples)) for m in gathering.modules]
        if gathering.on_layer is not None:
            stack.enter_context(layers_observed(model, gathering.on_layer))
        for part in gathering.micro_batches(num_samples):
            for tap in taps:
                tap.reduce = gathering.reduce if part.stop >= num_samples else None
            total_loss += _forward_backward(model, calibration[part], weight_B[part], gathering.bfloat16)
    return total_loss


def _token_weights(num_samples: int, predicted: int, mean_over: int | None) -> Tensor:
    """What each token of a sample weighs in the loss: one over the tokens of its mini-batch, [B]."""
    size = num_samples if mean_over is None else mean_over
    index = torch.arange(num_samples)
    in_mini_batch = torch.clamp(num_samples - index // size * size, max=size)
    return 1.0 / (in_mini_batch * predicted).double()


def _forward_backward(model: Any, batch_BT: Tensor, weight_B: Tensor, bfloat16: bool) -> float:
    """Backward of the weighted sum of token losses; returns their plain sum."""
    with torch.enable_grad():
        with torch.autocast(batch_BT.device.type, torch.bfloat16, enabled=bfloat16):
            hidden = model.model(input_ids=batch_BT, use_cache=False).last_hidden_state
        loss, plain = batch_loss(hidden, model.lm_head.weight.detach(), batch_BT, weight_B, bfloat16=bfloat16)
    if loss.requires_grad:
        torch.autograd.backward(loss)
    return float(plain)


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
