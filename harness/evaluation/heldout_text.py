"""The text that a model's perplexity and its divergence from the dense model are measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harness.corpora import Corpus
from harness.errors import UserError


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """The first tokens of a corpus, in windows that are read on their own."""

    tokens: Tensor
    """int64 [num_tokens], without special tokens."""
    length: int
    """Tokens of a window; windows do not overlap, and the last may be shorter."""
    num_words: int
    """Separated by blanks."""

    @staticmethod
    def of(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, num_tokens: int, length: int) -> HeldOutText:
        """The first ``num_tokens`` tokens, the passages joined by blank lines.

        Raises:
            UserError: the corpus has fewer.
        """
        ids: list[int] = []
        for passage in corpus.passages:
            ids += tokenizer.encode(passage + "\n\n", add_special_tokens=False)
            if len(ids) >= num_tokens:
                tokens = torch.tensor(ids[:num_tokens])
                return HeldOutText(tokens, length, len(tokenizer.decode(tokens).split()))
        raise UserError(f"the held-out text {corpus.name!r} has {len(ids):,} tokens, not {num_tokens:,}; ask for fewer")

    def batches(self, batch_tokens: int) -> Iterator[tuple[int, Tensor]]:
        """First token and windows [B, T] of batches of about ``batch_tokens``; a shorter last window comes alone."""
        whole = len(self.tokens) // self.length * self.length
        step = max(1, batch_tokens // self.length) * self.length
        for start in range(0, whole, step):
            yield start, self.tokens[start : min(start + step, whole)].view(-1, self.length)
        if len(self.tokens) - whole > 1:  # of one token alone, none is predicted
            yield whole, self.tokens[whole:].unsqueeze(0)
