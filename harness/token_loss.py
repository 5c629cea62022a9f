"""The next-token loss and its gradients without ever holding the logits of all tokens: for pruning and for training.

Shape letters: B sequences, T tokens of a sequence, N tokens in all, H hidden_size, h the teacher's, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.weights import VOCABULARY_ROWS

LOGIT_TOKENS = 256
"""Tokens whose logits exist at the same time; 50 MB at a vocabulary of 49,152. More is hardly faster."""


@dataclass(frozen=True)
class Teacher:
    """What a model is distilled from, on the tokens of one batch."""

    hidden_Nh: Tensor  # noqa: N815 (shape letters)
    head_Vh: Tensor  # noqa: N815
    temperature: float
    share: float
    """Of the divergence in the loss, in (0, 1]; the rest is the cross-entropy."""


def token_loss(
    hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor, teacher: Teacher | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the tokens' losses, and the plain sum of their cross-entropies; float64 scalars.

    The first is differentiable by the hidden states, and by the head where that requires a gradient. With a teacher a
    token's loss is (1 - share) CE + share t^2 KL(teacher || model), both distributions at temperature t.

    Args:
        hidden_NH: final hidden states of the tokens that predict.
        head_VH: the output head's weight; of a narrower dtype, it is cast a slice of the vocabulary at a time.
        target_N: token ids that should be predicted.
        weight_N: what each token weighs.
        teacher: None trains on the text alone.

    Source: distillation as in arXiv:1503.02531, section 2.
    """
    loss, plain = _TokenLoss.apply(hidden_NH, head_VH, target_N, weight_N, teacher)  # type: ignore[no-untyped-call]
    return loss, plain


def batch_loss(
    hidden_BTH: Tensor, head_VH: Tensor, batch_BT: Tensor, weight_B: Tensor, *, bfloat16: bool = False
) -> tuple[Tensor, Tensor]:
    """``token_loss`` of some sequences, every token predicting the one after it.

    Args:
        hidden_BTH: final hidden states.
        head_VH: the output head's weight.
        batch_BT: token ids.
        weight_B: what each token of a sequence weighs.
        bfloat16: let the head multiply in bfloat16.
    """
    predicting_NH = hidden_BTH[:, :-1].flatten(0, 1).to(torch.bfloat16 if bfloat16 else hidden_BTH.dtype)
    weight_N = weight_B.repeat_interleave(batch_BT.shape[1] - 1)
    return token_loss(predicting_NH, head_VH, batch_BT[:, 1:].flatten(), weight_N)


class _TokenLoss(torch.autograd.Function):
    """All gradients are made in the forward pass, where the logits of a few tokens are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor, teacher: Teacher | None
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        head = head_VH.to(hidden_NH.dtype) if head_VH.dtype.itemsize > hidden_NH.dtype.itemsize else head_VH
        hidden_slope_NH = torch.empty_like(hidden_NH)
        # In the head's own type even where products are bfloat16: many small numbers are added up.
        head_slope_VH = torch.zeros_like(head_VH) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        plain = torch.zeros_like(loss)
        for start in range(0, len(hidden_NH), LOGIT_TOKENS):
            part = slice(start, start + LOGIT_TOKENS)
            logits_VN = _logits(head, hidden_NH[part]).to(wide)
            part_loss, part_plain, slope_VN = _losses(logits_VN, target_N[part], weight_N[part].to(wide), teacher, part)
            loss += part_loss
            plain += part_plain
            slope_VN = slope_VN.to(hidden_NH.dtype)
            _back_through_head(slope_VN, head, hidden_slope_NH[part])
            if head_slope_VH is not None:
                head_slope_VH += slope_VN @ hidden_NH[part]
        ctx.save_for_backward(hidden_slope_NH, head_slope_VH)
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        by_input = (None if slope is None else slope * slopes[0].to(slope.dtype) for slope in ctx.saved_tensors)
        return (*by_input, None, None, None)


def _losses(
    logits_VN: Tensor, target_N: Tensor, weight_N: Tensor, teacher: Teacher | None, part: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, plain cross-entropy, and the slope of the former by the logits, which are overwritten."""
    distilled = None if teacher is None else _divergence(logits_VN, weight_N, teacher, part)
    nats_N, slope_VN = _cross_entropy(logits_VN, target_N, weight_N)
    loss = (nats_N * weight_N).sum()
    if teacher is not None and distilled is not None:
        divergence, distilled_VN = distilled
        loss = (1 - teacher.share) * loss + divergence
        slope_VN.mul_(1 - teacher.share).add_(distilled_VN)
    return loss, nats_N.sum(), slope_VN


def _cross_entropy(logits_VN: Tensor, target_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Nats per token, and the slope of their weighted sum by the logits, which are overwritten by it."""
    highest = logits_VN.amax(0)
    chosen = logits_VN.gather(0, target_N[None])[0] - highest
    slope_VN = logits_VN.sub_(highest).exp_()
    normaliser = slope_VN.sum(0)
    nats_N = normaliser.log() - chosen
    slope_VN.mul_(weight_N / normaliser)
    slope_VN.scatter_add_(0, target_N[None], -weight_N[None])
    return nats_N, slope_VN


def _divergence(logits_VN: Tensor, weight_N: Tensor, teacher: Teacher, part: slice) -> tuple[Tensor, Tensor]:
    """The share of the weighted divergence in the loss, and its slope by the logits, which stay."""
    t = teacher.temperature
    expected_VN = (_logits(teacher.head_Vh, teacher.hidden_Nh[part]).to(logits_VN.dtype) / t).log_softmax(0)
    found_VN = (logits_VN / t).log_softmax(0)
    probability_VN = expected_VN.exp()
    divergence_N = (probability_VN * (expected_VN - found_VN)).sum(0)
    slope_VN = (found_VN.exp() - probability_VN) * (teacher.share * t * weight_N)
    return teacher.share * t**2 * (divergence_N * weight_N).sum(), slope_VN


def _logits(head_VH: Tensor, hidden_NH: Tensor) -> Tensor:
    """[V, N]: vocabulary first, with which products run a fifth faster than with the tokens first."""
    pieces = [some_vH @ hidden_NH.T for _, some_vH in _slices(head_VH, hidden_NH.dtype)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _back_through_head(slope_VN: Tensor, head_VH: Tensor, out_NH: Tensor) -> None:
    """Write the slope by the hidden states into ``out_NH``."""
    for rows, some_vH in _slices(head_VH, out_NH.dtype):
        torch.addmm(out_NH, slope_VN[rows].T, some_vH, beta=0 if rows.start == 0 else 1, out=out_NH)


def _slices(head_VH: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in one piece where it has the dtype, else cast slice by slice: which rows, and those rows [v, H]."""
    size = len(head_VH) if head_VH.dtype == dtype else VOCABULARY_ROWS
    for start in range(0, len(head_VH), size):
        rows = slice(start, start + size)
        yield rows, head_VH[rows].to(dtype)
