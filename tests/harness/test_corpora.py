"""Text corpora: distinct passages, none of the held-out ones shared with a calibration text, clear refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.corpora import load_corpus
from harness.errors import UserError


def word_runs(passage: str, length: int = 8) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", passage.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.mark.parametrize(
    ("name", "num_passages", "evaluated"),
    [("wikipedia", 2938, {"boolq"}), ("books", 5151, {"lambada_openai"}), ("heldout", 493, set())],
)
def test_embedded_corpora_hold_distinct_passages(name: str, num_passages: int, evaluated: set[str]) -> None:
    corpus = load_corpus(name)
    assert len(corpus.passages) == len(set(corpus.passages)) == num_passages
    assert corpus.evaluated_tasks == evaluated
    assert all(passage == passage.strip() != "" for passage in corpus.passages)


def test_held_out_text_shares_no_eight_words_in_a_row_with_calibration_texts() -> None:
    heldout = set().union(*map(word_runs, load_corpus("heldout").passages))
    for name in ("wikipedia", "books"):
        assert not any(heldout & word_runs(passage) for passage in load_corpus(name).passages)


def test_a_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("One\nparagraph.\n\n\n Two. \n\nOne\nparagraph.\n")
    assert load_corpus(str(path)).passages == ("One\nparagraph.", "Two.")


def test_a_jsonl_file_gives_its_text_fields(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("a", "b\n\nc")) + "\n\n")
    assert load_corpus(str(path)).passages == ("a", "b\n\nc")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("empty.txt", " \n\n ", "holds no text"),
        ("bad.jsonl", '{"text": "a"}\n{"text": ', r"line 2 of .* is not JSON"),
        ("other.jsonl", '{"content": "a"}', r"line 1 of .* has no string field 'text'"),
        ("gone.txt", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_error(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    path = tmp_path / file
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_corpus(str(path))


def test_a_text_breaks_into_lines_only_at_line_ends_and_holds_characters_only(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = ['{"text": "one\u2028two"}', '{"text": "half \\ud83d"}']
    path.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    assert load_corpus(str(path)).passages == ("one\u2028two", "half ?")


def test_a_file_without_blank_lines_is_taken_apart(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"line {i} of a text" for i in range(2000)))
    passages = load_corpus(str(path)).passages
    assert len(passages) > 3
    assert all(len(passage) <= 8000 and passage.startswith("line ") for passage in passages)
    assert "\n".join(passages) == path.read_text()


def test_an_unknown_name_gets_the_closest_known_one() -> None:
    with pytest.raises(UserError, match="did you mean 'wikipedia'"):
        load_corpus("wikipeda")


def test_a_hub_out_of_reach_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_args: Any, **_kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"'c4' \(allenai/c4 on the hub\) cannot be reached"):
        load_corpus("c4")


@pytest.mark.network
def test_a_hub_corpus_gives_passages() -> None:
    assert len(load_corpus("wikitext2").passages) > 1000
