"""Tokenised requests on the disk: encoded once per tokenizer, shared by every model of a comparison.

The tracks of a comparison run in processes of their own, so what they share lies in a file. Its name is a hash of the
texts and of everything that decides how they are encoded; what a file holds is never wrong, only unused.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from harness.durable import write_file

Text = tuple[str, str]
"""Context and continuation."""
Tokens = tuple[list[int], list[int]]
"""The ids of each."""


def cache_file(
    folder: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, object], texts: Sequence[Text]
) -> Path | None:
    """Where the tokens of these texts are kept; None for a tokenizer that cannot be told from others.

    Args:
        folder: of the cache.
        tokenizer: whose tokens they are.
        options: everything else that decides how a text is encoded.
        texts: to encode.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.sha256(backend.to_str().encode())
    digest.update(repr((type(tokenizer).__name__, version("tokenizers"), version("lm-eval"), options)).encode())
    for text in texts:
        digest.update(repr(text).encode())
    return folder / f"requests-{digest.hexdigest()[:20]}.npz"


def read_requests(path: Path, num_requests: int) -> list[Tokens] | None:
    """What a file holds; None where it is absent or was damaged."""
    try:
        with np.load(path) as file:
            contexts = _split(file["context_ids"], file["context_lengths"])
            continuations = _split(file["continuation_ids"], file["continuation_lengths"])
            found = [
                (contexts[which], ids) for which, ids in zip(file["context_of"].tolist(), continuations, strict=True)
            ]
    except (OSError, ValueError, KeyError, IndexError, EOFError, BadZipFile):
        return None
    return found if len(found) == num_requests else None


def write_requests(path: Path, requests: Sequence[Tokens]) -> None:
    """Keep tokens, every distinct context once.

    Raises:
        UserError: the folder cannot be written to or the disk is full.
    """
    numbers: dict[tuple[int, ...], int] = {}
    context_of = [numbers.setdefault(tuple(context), len(numbers)) for context, _ in requests]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        context_of=np.array(context_of, np.int64),
        context_ids=_joined(list(numbers)),
        context_lengths=np.array([len(context) for context in numbers], np.int64),
        continuation_ids=_joined([continuation for _, continuation in requests]),
        continuation_lengths=np.array([len(continuation) for _, continuation in requests], np.int64),
    )
    write_file(path, buffer.getvalue())


def _joined(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    return np.array([token for row in rows for token in row], np.int32)


def _split(ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> list[list[int]]:
    ends = np.cumsum(lengths).tolist()
    everything = ids.tolist()
    if len(everything) != (ends[-1] if ends else 0):
        raise ValueError("the lengths do not add up")
    return [everything[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
