"""Log-probabilities of chosen tokens from hidden states, without logits for every token at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

# Shapes: R hidden states of size C, S tokens to score, V the whole vocabulary, v a slice of it.

_ROWS = 1024
_VOCABULARY_SLICE = 4096
"""Logits held at once are ROWS x SLICE: 16 MB in float32, so that they are still in the cache when summed up."""


def token_logprobs(head: nn.Linear, hidden_R: Tensor, row_S: Tensor, token_S: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token after its hidden state, and whether it is a most likely one.

    Logits and softmax are float32 at least, whatever the dtype of the model: bfloat16 logits tie between choices.

    Args:
        head: the output embedding, hidden_size -> vocab_size.
        hidden_R: [R, hidden_size].
        row_S: int64 [S]: the hidden state that predicts each token.
        token_S: int64 [S].

    Returns:
        float32 (float64 for a float64 model) [S] and bool [S], on the CPU.
    """
    row_S, token_S = row_S.to(head.weight.device), token_S.to(head.weight.device)
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    logprob_S = torch.empty(len(token_S), dtype=dtype, device=head.weight.device)
    greedy_S = torch.empty(len(token_S), dtype=torch.bool, device=head.weight.device)
    for start in range(0, len(hidden_R), _ROWS):
        some = torch.nonzero((row_S >= start) & (row_S < start + _ROWS)).squeeze(1)
        rows, tokens = row_S[some] - start, token_S[some]
        chosen, normaliser, highest = _scan_vocabulary(head, hidden_R[start : start + _ROWS], dtype, rows, tokens)
        logprob_S[some] = chosen - normaliser[rows]
        greedy_S[some] = chosen >= highest[rows]
    return logprob_S.cpu(), greedy_S.cpu()


def _scan_vocabulary(
    head: nn.Linear, hidden: Tensor, dtype: torch.dtype, rows: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the vocabulary in slices: chosen logits [S], log of the summed exponentials [R], maxima [R]."""
    chosen = torch.empty(len(tokens), dtype=dtype, device=head.weight.device)
    partial, highest = [], []
    for first, logits_Rv in zip(range(0, head.out_features, _VOCABULARY_SLICE), _logits(head, hidden), strict=True):
        inside = torch.nonzero((tokens >= first) & (tokens < first + _VOCABULARY_SLICE)).squeeze(1)
        chosen[inside] = logits_Rv[rows[inside], tokens[inside] - first]
        highest.append(logits_Rv.amax(dim=-1))
        partial.append(torch.logsumexp(logits_Rv, dim=-1))
    return chosen, torch.logsumexp(torch.stack(partial), dim=0), torch.stack(highest).amax(dim=0)


def kl_divergences(reference: nn.Linear, reference_RC: Tensor, head: nn.Linear, hidden_RC: Tensor) -> Tensor:
    """KL divergence of a model's next-token distributions from a reference's, by hidden states of the same tokens.

    The expectation, over the reference's distribution, of its log-probability less the model's. Logits are float32
    at least; states that are equal under equal heads give exactly 0.

    Args:
        reference: the reference's output embedding.
        reference_RC: [R, its hidden_size].
        head: the model's, over the same vocabulary.
        hidden_RC: [R, its hidden_size].

    Returns:
        Nats, float32 (float64 for a float64 model) [R], on the CPU.
    """
    parts = [
        _kl_of_rows(reference, reference_RC[start : start + _ROWS], head, hidden_RC[start : start + _ROWS])
        for start in range(0, len(hidden_RC), _ROWS)
    ]
    return torch.cat(parts).cpu()


def _kl_of_rows(reference: nn.Linear, reference_RC: Tensor, head: nn.Linear, hidden_RC: Tensor) -> Tensor:
    """One pass over the vocabulary: E[difference of logits] less the difference of the log-normalisers."""
    weighted, highest, expected, given = [], [], [], []
    for ours_Rv, elsewhere_Rv in zip(_logits(head, hidden_RC), _logits(reference, reference_RC), strict=True):
        theirs_Rv = elsewhere_Rv.to(ours_Rv.device)
        high_R = theirs_Rv.amax(dim=-1)
        weighted.append(((theirs_Rv - high_R[:, None]).exp() * (theirs_Rv - ours_Rv)).sum(dim=-1))
        highest.append(high_R)
        expected.append(torch.logsumexp(theirs_Rv, dim=-1))
        given.append(torch.logsumexp(ours_Rv, dim=-1))
    normaliser_R = torch.logsumexp(torch.stack(expected), dim=0)
    mean_difference_R = (torch.stack(weighted) * (torch.stack(highest) - normaliser_R).exp()).sum(dim=0)
    return mean_difference_R - (normaliser_R - torch.logsumexp(torch.stack(given), dim=0))


def _logits(head: nn.Linear, hidden_RC: Tensor) -> Iterator[Tensor]:
    """Logits of the vocabulary, slice by slice: [R, v], in float32 at least."""
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    hidden_RC = hidden_RC.to(device=head.weight.device, dtype=dtype)
    for first in range(0, head.out_features, _VOCABULARY_SLICE):
        last = min(first + _VOCABULARY_SLICE, head.out_features)
        bias = None if head.bias is None else head.bias[first:last].to(dtype)
        yield functional.linear(hidden_RC, head.weight[first:last].to(dtype), bias)


def plain_head(model: PreTrainedModel) -> nn.Linear | str:
    """The output embedding, where hidden states times its weight are the logits; else why they are not."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return f"its head is a {type(head).__name__}"
    if head.weight.is_meta:
        return "its head is offloaded"
    for scaling in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, scaling, None) not in (None, 1, 1.0):
            return f"its config scales the logits ({scaling})"
    return head
