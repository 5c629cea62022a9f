"""The training loss without logits for every token: their gradients are made while a few tokens' logits exist.

Shape letters: N tokens, H hidden_size, h the teacher's, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOGIT_TOKENS = 256
"""Tokens whose logits exist at the same time."""


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
    """Weighted sum of the tokens' losses, differentiable by hidden states and head, and of their cross-entropies.

    With a teacher a token's loss is (1 - share) CE + share t^2 KL(teacher || model), both distributions at
    temperature t; float64 scalars.

    Args:
        hidden_NH: final hidden states of the tokens that predict.
        head_VH: weight of the output head; gets no gradient where it requires none.
        target_N: token ids that should be predicted.
        weight_N: what each token weighs.
        teacher: None trains on the text alone.

    Source: distillation as in arXiv:1503.02531, section 2.
    """
    loss, plain = _TokenLoss.apply(hidden_NH, head_VH, target_N, weight_N, teacher)  # type: ignore[no-untyped-call]
    return loss, plain


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor, teacher: Teacher | None
    ) -> tuple[Tensor, Tensor]:
        slope_NH = torch.empty_like(hidden_NH)
        head = head_VH.detach().to(hidden_NH.dtype)
        # In float32 even where the products are bfloat16: many small numbers are added up.
        head_slope_VH = torch.zeros_like(head_VH) if head_VH.requires_grad else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        plain = torch.zeros_like(loss)
        for start in range(0, len(hidden_NH), LOGIT_TOKENS):
            part = slice(start, start + LOGIT_TOKENS)
            weight = weight_N[part].to(torch.promote_types(hidden_NH.dtype, torch.float32))
            logits_VN = (head @ hidden_NH[part].T).to(weight.dtype)
            divergence, slope_VN = _distil(logits_VN, teacher, part, weight)
            nats, own_slope_VN = _cross_entropy(logits_VN, target_N[part], weight)
            share = 0.0 if teacher is None else teacher.share
            plain += nats.sum(dtype=torch.float64)
            loss += (1 - share) * nats.sum(dtype=torch.float64) + divergence
            own_slope_VN *= 1 - share
            if slope_VN is not None:
                own_slope_VN += slope_VN
            narrow_VN = own_slope_VN.to(head.dtype)
            torch.mm(narrow_VN.T, head, out=slope_NH[part])
            if head_slope_VH is not None:
                if head_slope_VH.dtype == head.dtype:
                    head_slope_VH.addmm_(narrow_VN, hidden_NH[part])
                else:
                    head_slope_VH += narrow_VN @ hidden_NH[part]
        ctx.save_for_backward(slope_NH, *([] if head_slope_VH is None else [head_slope_VH]))
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        slope_NH, *rest = ctx.saved_tensors
        factor = slopes[0]
        head = rest[0] * factor.to(rest[0].dtype) if rest else None
        return slope_NH * factor.to(slope_NH.dtype), head, None, None, None


def _cross_entropy(logits_VN: Tensor, target_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted nats per token and their slope by the logits, which are overwritten by it."""
    highest = logits_VN.amax(0)
    chosen = logits_VN.gather(0, target_N[None])[0] - highest
    slope_VN = logits_VN.sub_(highest).exp_()
    normaliser = slope_VN.sum(0)
    nats = (normaliser.log() - chosen) * weight_N
    slope_VN.mul_(weight_N / normaliser)
    slope_VN.scatter_add_(0, target_N[None], -weight_N[None])
    return nats, slope_VN


def _distil(
    logits_VN: Tensor, teacher: Teacher | None, part: slice, weight_N: Tensor
) -> tuple[Tensor | float, Tensor | None]:
    """The share of the weighted divergence in the loss, and its slope by the logits; the logits stay."""
    if teacher is None:
        return 0.0, None
    t = teacher.temperature
    known_VN = (teacher.head_Vh.to(teacher.hidden_Nh.dtype) @ teacher.hidden_Nh[part].T).to(logits_VN.dtype)
    expected_VN = (known_VN / t).log_softmax(0)
    found_VN = (logits_VN / t).log_softmax(0)
    probability_VN = expected_VN.exp()
    divergence_N = (probability_VN * (expected_VN - found_VN)).sum(0)
    slope_VN = (found_VN.exp() - probability_VN) * (teacher.share * t * weight_N)
    return teacher.share * t**2 * (divergence_N * weight_N).sum(dtype=torch.float64), slope_VN
