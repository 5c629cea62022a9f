"""Perplexity of held-out text, per token and per word, in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.corpora import Corpus
from harness.errors import UserError
from harness.evaluation.forest_pass import NonFiniteOutputError, Progress, describe_break, watching_for_non_finite
from harness.evaluation.head import plain_head, token_logprobs


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How surprising a text is; the convention is part of the number.

    The text is cut into windows that do not overlap and are read on their own, without special tokens. The first
    token of a window is not scored.
    """

    token: float
    """exp of the mean loss over the scored tokens, every token with the same weight."""
    word: float
    """exp of (mean loss x tokens / words): the loss of the whole text at that mean, spread over its words."""
    num_scored: int
    """Tokens behind the mean."""
    loss_stderr: float | None
    """Standard error of the mean loss, over windows, in nats per token; None for a single window."""


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    num_tokens: int,
    length: int,
    batch_tokens: int,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity on the first ``num_tokens`` tokens of a corpus, in windows of ``length`` tokens.

    Raises:
        UserError: the corpus is too short.
        NonFiniteOutputError: the model is broken.
    """
    tokens = heldout_tokens(corpus, tokenizer, num_tokens)
    windows = [window for window in torch.split(tokens, length) if len(window) > 1]
    rows = max(1, batch_tokens // length)
    losses: list[Tensor] = []
    done = 0
    while done < len(windows):
        # Only the last window can be shorter; it is a batch of its own.
        batch = [window for window in windows[done : done + rows] if len(window) == len(windows[done])]
        losses.append(_losses(model, torch.stack(batch)))
        done += len(batch)
        if progress is not None:
            progress(min(done * length, len(tokens)), len(tokens))
    words = len(tokenizer.decode(tokens).split())
    return _summary(losses, len(tokens), words)


def heldout_tokens(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Tensor:
    """The first tokens of a corpus, its passages joined by blank lines; int64 [num_tokens].

    Raises:
        UserError: the corpus has fewer.
    """
    ids: list[int] = []
    for passage in corpus.passages:
        ids += tokenizer.encode(passage + "\n\n", add_special_tokens=False)
        if len(ids) >= num_tokens:
            return torch.tensor(ids[:num_tokens])
    raise UserError(f"the held-out text {corpus.name!r} has {len(ids):,} tokens, not {num_tokens:,}; ask for fewer")


def _summary(losses: list[Tensor], num_tokens: int, num_words: int) -> Perplexity:
    every = torch.cat([loss.flatten() for loss in losses])
    mean = float(every.mean())
    sums = torch.cat([(loss - mean).sum(dim=1) for loss in losses])  # each window's share in the error of the mean
    stderr = None
    if len(sums) > 1:
        stderr = math.sqrt(float((sums**2).sum()) * len(sums) / (len(sums) - 1)) / len(every)
    return Perplexity(math.exp(mean), math.exp(mean * num_tokens / num_words), len(every), stderr)


@torch.no_grad()
def _losses(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Negative log-probabilities of all tokens but the first of each row; float64 [B, T - 1]."""
    tokens_BT = tokens_BT.to(model.get_input_embeddings().weight.device)
    targets = tokens_BT[:, 1:].flatten()
    head = plain_head(model)
    if isinstance(head, nn.Linear):
        hidden = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        row = torch.arange(len(targets), device=targets.device)
        logprob, _ = token_logprobs(head, hidden, row, targets)
    else:
        logits = torch.cat([model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in tokens_BT]).float()
        logprob = logits.log_softmax(-1).gather(1, targets.to(logits.device).unsqueeze(1)).squeeze(1).cpu()
    if not torch.isfinite(logprob).all():
        with watching_for_non_finite(model) as broken:
            model(input_ids=tokens_BT[:1], use_cache=False)
        raise NonFiniteOutputError(describe_break(broken))
    return -logprob.double().view(len(tokens_BT), -1)
