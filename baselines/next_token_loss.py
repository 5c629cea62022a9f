"""The next-token loss and its gradient without ever holding the logits of all tokens.

Shape letters: N tokens, H hidden_size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGIT_TOKENS = 128
"""Tokens whose logits exist at the same time; 25 MB at a vocabulary of 49,152. More is no faster."""


def next_token_loss(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies, differentiable by ``hidden_NH`` alone, and their plain sum; float64 scalars.

    Args:
        hidden_NH: final hidden states of the tokens that predict.
        head_VH: the output head's weight, of the same dtype.
        target_N: token ids that should be predicted.
        weight_N: what each token weighs.
    """
    loss, plain = _NextTokenLoss.apply(hidden_NH, head_VH, target_N, weight_N)  # type: ignore[no-untyped-call]
    return loss, plain


class _NextTokenLoss(torch.autograd.Function):
    """Weighted cross-entropy of the head's predictions, whose logits live only a few tokens at a time.

    The gradient of the hidden states is made in the forward pass, where the logits are at hand. The head's own weight
    gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient_NH = torch.empty_like(hidden_NH)
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        loss = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        plain = torch.zeros_like(loss)
        for start in range(0, hidden_NH.shape[0], LOGIT_TOKENS):
            part = slice(start, start + LOGIT_TOKENS)
            logits = (hidden_NH[part] @ head_VH.T).to(wide)
            target, weight = target_N[part, None], weight_N[part].to(wide)
            normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
            nats = (normaliser - logits.gather(1, target)).squeeze(1)
            loss += (nats * weight).sum()
            plain += nats.sum()
            slope = logits.sub_(normaliser).exp_()
            slope.scatter_add_(1, target, slope.new_full((1, 1), -1.0).expand_as(target))
            slope.mul_(weight[:, None])
            torch.mm(slope.to(head_VH.dtype), head_VH, out=gradient_NH[part])
        ctx.save_for_backward(gradient_NH)
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * slopes[0].to(gradient_NH.dtype), None, None, None
