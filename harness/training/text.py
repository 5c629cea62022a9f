"""Training text: tokenised once per tokenizer into files that are mapped into memory, whatever its size."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.corpora import load_corpus
from harness.durable import disk_errors, remove, sync_folder, write_synced
from harness.errors import UserError
from harness.records import TrainingSpec
from harness.training.chats import Piece, is_chats, load_chats, pieces
from harness.training.data import PackedText

_AT_ONCE = 256
"""Documents tokenised together."""
_SHORTEST_DOCUMENT = 64
"""Tokens; bounds how many documents of a large corpus a budget may need."""


def training_text(spec: TrainingSpec, tokenizer: Any, cache: Path) -> PackedText:
    """The tokens of ``spec.source``, at least one pass of ``spec.tokens`` where it has as many.

    Documents are separated by the tokenizer's end-of-text token. The files are named by a hash of the documents and
    the tokenizer, so another budget, seed or context length reads the same ones.

    Args:
        spec: source, tokens and context length.
        tokenizer: the model's own.
        cache: folder for the files.

    Raises:
        UserError: an unknown source, or less text than one window.
    """
    documents = [document for source in spec.source.split("+") for document in _documents(source, spec, tokenizer)]
    digest = _digest(documents, tokenizer)
    folder = cache / f"text-{digest[:20]}"
    if not (folder / "text.json").is_file():
        _write(folder, documents, tokenizer, digest)
    told = json.loads((folder / "text.json").read_text())
    tokens = np.memmap(folder / "tokens.u32", np.uint32, mode="r")
    scored = np.memmap(folder / "scored.bool", np.bool_, mode="r") if told["masked"] else None
    if len(tokens) < spec.context_length:
        raise UserError(
            f"the training text {spec.source!r} has {len(tokens):,} tokens, less than one window of "
            f"{spec.context_length}; give more text or a smaller context length"
        )
    return PackedText(tokens, spec.context_length, scored, sha256=told["sha256"])


def tasks_asking_about(source: str) -> frozenset[str]:
    """The lm-eval tasks that show the very text of a source to the model."""
    corpora = [load_corpus(name) for name in source.split("+") if not is_chats(name)]
    return frozenset().union(*(corpus.evaluated_tasks for corpus in corpora))


def _documents(source: str, spec: TrainingSpec, tokenizer: Any) -> Iterator[tuple[Piece, ...]]:
    most = max(spec.tokens // _SHORTEST_DOCUMENT, 20_000)
    if is_chats(source):
        for chat in load_chats(source, most):
            yield tuple(pieces(chat, tokenizer))
    else:
        for passage in load_corpus(source).passages[:most]:
            yield ((passage, True),)


def _digest(documents: list[tuple[Piece, ...]], tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    digest = hashlib.sha256(described.encode())
    digest.update(repr((type(tokenizer).__name__, version("tokenizers"), tokenizer.eos_token_id)).encode())
    for document in documents:
        digest.update(repr(document).encode())
    return digest.hexdigest()


def _write(folder: Path, documents: list[tuple[Piece, ...]], tokenizer: Any, digest: str) -> None:
    """Write the files beside their place, then move them there: a killed run leaves nothing that is read later."""
    fresh = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    masked = any(not counts for document in documents for _, counts in document)
    with disk_errors(folder.parent):
        fresh.mkdir(parents=True)
        try:
            with (fresh / "tokens.u32").open("wb") as tokens, (fresh / "scored.bool").open("wb") as scored:
                for start in range(0, len(documents), _AT_ONCE):
                    ids, counts = _encoded(documents[start : start + _AT_ONCE], tokenizer)
                    ids.tofile(tokens)
                    if masked:
                        counts.tofile(scored)
            write_synced(fresh / "text.json", json.dumps({"masked": masked, "sha256": digest}).encode())
            try:
                fresh.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
            sync_folder(folder.parent)
        finally:
            remove(fresh)


def _encoded(documents: list[tuple[Piece, ...]], tokenizer: Any) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """Ids of some documents one after the other, and which of them count."""
    flat = [text for document in documents for text, _ in document]
    encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    counts: list[bool] = []
    for document in documents:
        for _, scored in document:
            piece = next(encoded)
            ids += piece
            counts += [scored] * len(piece)
        ids += end
        counts += [document[-1][1]] * len(end)
    return np.array(ids, np.uint32), np.array(counts, np.bool_)
