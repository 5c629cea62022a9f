"""Calibration tokens: the same ids for every method of a comparison."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.corpora import Corpus, load_corpus
from harness.errors import UserError
from harness.records import CalibrationSpec


@dataclass(frozen=True)
class Calibration:
    """Token ids to score with, and where they come from."""

    tokens: Tensor
    """int64 [num_samples, num_tokens], without padding."""
    sha256: str
    """Of the ids, row-major int64."""
    evaluated_tasks: frozenset[str]
    """lm-eval tasks that ask about the same text: calibrating on it favours nobody fairly."""


def draw_calibration(spec: CalibrationSpec, tokenizer: Any, seed: int, max_length: int | None = None) -> Calibration:
    """Draw calibration sequences from a corpus.

    Its passages, shuffled by the seed and joined by blank lines, are one stream of tokens, cut into sequences; no
    special tokens are added and nothing is padded, so every id is text.

    Args:
        spec: corpus and sizes.
        tokenizer: the model's own.
        seed: shuffles the passages.
        max_length: longest sequence the model takes.

    Raises:
        UserError: the corpus is too short, or the sequences are longer than the model takes.
    """
    if max_length is not None and spec.num_tokens > max_length:
        raise UserError(
            f"calibration sequences of {spec.num_tokens} tokens are longer than the {max_length} that the model takes; "
            "pass a smaller --calibration-length"
        )
    corpus = load_corpus(spec.source)
    ids = _stream(corpus, tokenizer, seed, spec.num_samples * spec.num_tokens)
    tokens = torch.tensor(ids, dtype=torch.int64).view(spec.num_samples, spec.num_tokens)
    return Calibration(tokens, tokens_sha256(tokens), corpus.evaluated_tasks)


def tokens_sha256(tokens: Tensor) -> str:
    """Hash of token ids as row-major int64."""
    return hashlib.sha256(tokens.to(torch.int64).cpu().contiguous().numpy().tobytes()).hexdigest()


def _stream(corpus: Corpus, tokenizer: Any, seed: int, num_tokens: int) -> list[int]:
    passages = list(corpus.passages)
    random.Random(seed).shuffle(passages)
    ids: list[int] = []
    for passage in passages:
        ids += tokenizer.encode(passage + "\n\n", add_special_tokens=False)
        if len(ids) >= num_tokens:
            return ids[:num_tokens]
    raise UserError(
        f"the calibration text {corpus.name!r} has {len(ids):,} tokens of the {num_tokens:,} asked for; "
        "pass fewer --calibration-samples, a smaller --calibration-length or more text"
    )
