"""The next-token loss and its gradient without ever holding the logits of all tokens.

Shape letters: B sequences, T tokens of a sequence, N tokens in all, H hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LOGIT_TOKENS = 256
"""Tokens whose logits exist at the same time; 50 MB at a vocabulary of 49,152. More is hardly faster."""

HEAD_ROWS = 16_384
"""Rows of a head of another dtype that are cast at once."""


def next_token_loss(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies, differentiable by ``hidden_NH`` alone, and their plain sum; float64 scalars.

    Args:
        hidden_NH: final hidden states of the tokens that predict.
        head_VH: the output head's weight; of another dtype, it is cast a slice of the vocabulary at a time.
        target_N: token ids that should be predicted.
        weight_N: what each token weighs.
    """
    loss, plain = _NextTokenLoss.apply(hidden_NH, head_VH, target_N, weight_N)  # type: ignore[no-untyped-call]
    return loss, plain


def batch_loss(
    hidden_BTH: Tensor, head_VH: Tensor, batch_BT: Tensor, weight_B: Tensor, *, bfloat16: bool = False
) -> tuple[Tensor, Tensor]:
    """``next_token_loss`` of some sequences, every token predicting the one after it.

    Args:
        hidden_BTH: final hidden states.
        head_VH: the output head's weight.
        batch_BT: token ids.
        weight_B: what each token of a sequence weighs.
        bfloat16: let the head multiply in bfloat16.
    """
    predicting_NH = hidden_BTH[:, :-1].flatten(0, 1).to(torch.bfloat16 if bfloat16 else hidden_BTH.dtype)
    weight_N = weight_B.repeat_interleave(batch_BT.shape[1] - 1)
    if head_VH.dtype.itemsize > predicting_NH.dtype.itemsize:
        head_VH = head_VH.to(predicting_NH.dtype)
    return next_token_loss(predicting_NH, head_VH, batch_BT[:, 1:].flatten(), weight_N)


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
            # Vocabulary first: both products run a fifth faster than with the tokens first.
            pieces = [some_vH @ hidden_NH[part].T for _, some_vH in _slices(head_VH, hidden_NH.dtype)]
            logits_VN = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(wide)
            target_1N, weight = target_N[None, part], weight_N[part].to(wide)
            highest = logits_VN.amax(0)
            chosen = logits_VN.gather(0, target_1N)[0] - highest
            slope_VN = logits_VN.sub_(highest).exp_()
            normaliser = slope_VN.sum(0)
            nats = normaliser.log() - chosen
            loss += (nats * weight).sum()
            plain += nats.sum()
            slope_VN.mul_(weight / normaliser)
            slope_VN.scatter_add_(0, target_1N, -weight[None])
            slope_VN = slope_VN.to(hidden_NH.dtype)
            gradient_NH[part] = 0
            for rows, some_vH in _slices(head_VH, hidden_NH.dtype):
                gradient_NH[part].addmm_(slope_VN[rows].T, some_vH)
        ctx.save_for_backward(gradient_NH)
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * slopes[0].to(gradient_NH.dtype), None, None, None


def _slices(head_VH: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in one piece where it has the dtype, else cast slice by slice: which rows, and those rows [v, H]."""
    size = len(head_VH) if head_VH.dtype == dtype else HEAD_ROWS
    for start in range(0, len(head_VH), size):
        rows = slice(start, start + size)
        yield rows, head_VH[rows].to(dtype)
