"""Held-out text in one pass: perplexity per token and per word, and the KL divergence from the dense model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.cpu import fast_cpu
from harness.evaluation.forest_pass import NonFiniteOutputError, Progress, describe_break, watching_for_non_finite
from harness.evaluation.head import kl_divergences, plain_head, token_logprobs
from harness.evaluation.heldout_text import HeldOutText
from harness.evaluation.reference import DenseReference, last_states


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over tokens, every token with the same weight."""

    value: float
    stderr: float | None
    """Over windows, as the tokens of one window go together; None for a single window."""


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """How a model reads a text; the first token of a window is not scored, as nothing stands before it."""

    loss: Mean
    """Nats per scored token."""
    kl_dense: Mean | None
    """KL divergence of its next-token distribution from the dense model's, nats per scored token."""
    num_scored: int
    num_tokens: int
    num_words: int

    @property
    def ppl_token(self) -> float:
        """Exp of the mean loss."""
        return math.exp(self.loss.value)

    @property
    def ppl_word(self) -> float:
        """Exp of (mean loss x tokens / words): the loss of the whole text at that mean, spread over its words."""
        return math.exp(self.loss.value * self.num_tokens / self.num_words)


@torch.no_grad()
@fast_cpu()
def measure_heldout(
    model: PreTrainedModel,
    text: HeldOutText,
    *,
    batch_tokens: int,
    reference: DenseReference | None = None,
    progress: Progress | None = None,
) -> HeldOutScores:
    """Read a text.

    Args:
        model: a causal language model in evaluation mode.
        text: of the model's own tokenizer.
        batch_tokens: tokens run at once.
        reference: the dense model's states on the same text; without it, or where the model has no plain output
            embedding, there is no divergence.
        progress: told after every batch.

    Raises:
        NonFiniteOutputError: the model is broken.
    """
    head = plain_head(model)
    losses, divergences = [], []
    for start, tokens_BT in text.batches(batch_tokens):
        size = (len(tokens_BT), -1)
        if isinstance(head, nn.Linear):
            dense_RC = reference.states(start, tokens_BT) if reference is not None else None
            # The dense model's own states are the reference's: they are not computed twice.
            is_dense = reference is not None and reference.model is model
            hidden_RC = (
                dense_RC if is_dense and dense_RC is not None else last_states(model, tokens_BT)[:, :-1].flatten(0, 1)
            )
            row = torch.arange(len(hidden_RC))
            logprob, _ = token_logprobs(head, hidden_RC, row, tokens_BT[:, 1:].flatten())
            if reference is not None and dense_RC is not None:
                divergences.append(kl_divergences(reference.head, dense_RC, head, hidden_RC).double().view(size))
        else:
            logprob = _logprobs_by_row(model, tokens_BT)
        _require_finite(model, tokens_BT, logprob)
        losses.append(-logprob.double().view(size))
        if progress is not None:
            progress(start + tokens_BT.numel(), len(text.tokens))
    kl_dense = _mean(divergences) if divergences else None
    return HeldOutScores(
        _mean(losses), kl_dense, sum(loss.numel() for loss in losses), len(text.tokens), text.num_words
    )


def _mean(values: list[Tensor]) -> Mean:
    every = torch.cat([value.flatten() for value in values])
    mean = float(every.mean())
    sums = torch.cat([(value - mean).sum(dim=1) for value in values])  # each window's share in the error of the mean
    stderr = None
    if len(sums) > 1:
        stderr = math.sqrt(float((sums**2).sum()) * len(sums) / (len(sums) - 1)) / len(every)
    return Mean(mean, stderr)


def _logprobs_by_row(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Log-probabilities of all tokens but the first of each row, [B * (T - 1)], by the model's own logits."""
    tokens_BT = tokens_BT.to(model.get_input_embeddings().weight.device)
    found = []
    for row_T in tokens_BT:
        logits_TV = model(input_ids=row_T[None], use_cache=False).logits[0, :-1].float()
        target = row_T[1:].to(logits_TV.device).unsqueeze(1)
        found.append(logits_TV.log_softmax(-1).gather(1, target).squeeze(1))
    return torch.cat(found).cpu()


def _require_finite(model: PreTrainedModel, tokens_BT: Tensor, logprob: Tensor) -> None:
    if torch.isfinite(logprob).all():
        return
    with watching_for_non_finite(model) as broken:
        model(input_ids=tokens_BT[:1].to(model.get_input_embeddings().weight.device), use_cache=False)
    raise NonFiniteOutputError(describe_break(broken))
