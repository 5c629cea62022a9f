"""Training text: tokenised once per tokenizer into files that are mapped into memory, whatever its size."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.corpora import MOST_HUB_PASSAGES, is_on_hub, load_corpus
from harness.durable import disk_errors, remove, sync_folder, write_synced
from harness.errors import UserError
from harness.records import TrainingSpec
from harness.training.chats import Piece, is_chats, load_chats, pieces
from harness.training.data import PackedText

_TOKENS, _SCORED, _TOLD = "tokens.u32", "scored.bool", "text.json"
_AT_ONCE = 256
"""Documents tokenised together."""
_SHORTEST_DOCUMENT = 64
"""Tokens; bounds how many documents of a large corpus a budget may need."""


def training_text(spec: TrainingSpec, tokenizer: Any, cache: Path) -> PackedText:
    """The tokens of ``spec.source``.

    Documents are separated by the tokenizer's end-of-text token. The files are named by a hash of the sources and the
    tokenizer, so another seed or context length reads the same ones.

    Args:
        spec: source, tokens and context length.
        tokenizer: the model's own.
        cache: folder for the files.

    Raises:
        UserError: an unknown source, or less text than one window.
    """
    sources = [
        _Source(name, max(spec.tokens // _SHORTEST_DOCUMENT, MOST_HUB_PASSAGES)) for name in spec.source.split("+")
    ]
    digest = _digest(sources, tokenizer)
    folder = cache / f"text-{digest[:20]}"
    if not (folder / _TOLD).is_file():
        _write(folder, chain.from_iterable(source.documents(tokenizer) for source in sources), tokenizer)
    tokens = np.memmap(folder / _TOKENS, np.uint32, mode="r")
    scored = (
        np.memmap(folder / _SCORED, np.bool_, mode="r") if any(is_chats(source.name) for source in sources) else None
    )
    if len(tokens) < spec.context_length:
        raise UserError(
            f"the training text {spec.source!r} has {len(tokens):,} tokens, less than one window of "
            f"{spec.context_length}; give more text or a smaller context length"
        )
    told = json.loads((folder / _TOLD).read_text())
    return PackedText(tokens, spec.context_length, scored, sha256=told["sha256"])


def tasks_asking_about(source: str) -> frozenset[str]:
    """The lm-eval tasks that show the very text of a source to the model."""
    corpora = [load_corpus(name) for name in source.split("+") if not is_chats(name)]
    return frozenset().union(*(corpus.evaluated_tasks for corpus in corpora))


@dataclass(frozen=True)
class _Source:
    name: str
    most: int
    """Documents taken of it, where the hub has more."""

    def documents(self, tokenizer: Any) -> Iterator[tuple[Piece, ...]]:
        """Passages, or conversations cut where answers begin and end."""
        if is_chats(self.name):
            return (tuple(pieces(chat, tokenizer)) for chat in load_chats(self.name, self.most))
        return (((passage, True),) for passage in load_corpus(self.name, self.most).passages)

    def identity(self) -> str:
        """Equal for equal documents: a hash of what is here, name and number of what the hub streams."""
        path = Path(self.name)
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        if is_chats(self.name) or is_on_hub(self.name):
            return f"{self.name}, {self.most}"
        return load_corpus(self.name).fingerprint()


def _digest(sources: list[_Source], tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    settings = (type(tokenizer).__name__, version("tokenizers"), tokenizer.eos_token_id)
    told = [described, settings, getattr(tokenizer, "chat_template", None), [source.identity() for source in sources]]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _write(folder: Path, documents: Iterator[tuple[Piece, ...]], tokenizer: Any) -> None:
    """Write the files beside their place, then move them there: a killed run leaves nothing that is read later."""
    fresh = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    digest = hashlib.sha256()
    with disk_errors(folder.parent):
        fresh.mkdir(parents=True)
        try:
            with (fresh / _TOKENS).open("wb") as tokens, (fresh / _SCORED).open("wb") as scored:
                while some := list(islice(documents, _AT_ONCE)):
                    for file, numbers in zip((tokens, scored), _encoded(some, tokenizer), strict=True):
                        numbers.tofile(file)
                        digest.update(numbers.tobytes())
            write_synced(fresh / _TOLD, json.dumps({"sha256": digest.hexdigest()}).encode())
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
