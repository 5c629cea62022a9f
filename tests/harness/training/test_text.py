"""Training text: masks of conversations, the files it is kept in, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from harness.corpora import load_corpus
from harness.errors import UserError
from harness.models import LoadedModel
from harness.records import TrainingSpec
from harness.training.chats import Message, chat_of, pieces
from harness.training.text import tasks_asking_about, training_text


def spec(source: str, **changes: Any) -> TrainingSpec:
    return TrainingSpec(tokens=1000, source=source, context_length=16, **changes)


def test_embedded_text_is_tokenised_once_and_mapped(smollm2: LoadedModel, tmp_path: Path) -> None:
    first = training_text(spec("reading"), smollm2.tokenizer, tmp_path)
    (folder,) = tmp_path.iterdir()
    written = (folder / "tokens.u32").stat().st_mtime_ns
    again = training_text(spec("reading", seed=3, learning_rate=1e-4), smollm2.tokenizer, tmp_path)
    assert (folder / "tokens.u32").stat().st_mtime_ns == written
    assert isinstance(first.tokens, np.memmap)
    assert np.array_equal(first.tokens, again.tokens)
    assert len(first.tokens) > 250_000
    passage = load_corpus("reading").passages[0]
    ids = smollm2.tokenizer(passage, add_special_tokens=False)["input_ids"]
    assert first.tokens[: len(ids) + 1].tolist() == [*ids, smollm2.tokenizer.eos_token_id]


def test_sources_are_joined(smollm2: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("One paragraph.\n\n" + " ".join(map(str, range(100))))
    alone = training_text(spec(str(path)), smollm2.tokenizer, tmp_path)
    both = training_text(spec(f"{path}+reading"), smollm2.tokenizer, tmp_path)
    assert both.tokens[: len(alone.tokens)].tolist() == alone.tokens.tolist()
    assert both.sha256 != alone.sha256
    assert tasks_asking_about("reading+wikipedia") == {"boolq"}


def test_of_conversations_only_answers_count(smollm2: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    messages = [
        {"role": "user", "content": "What is the capital of France, and why?"},
        {"role": "assistant", "content": "Paris, by history."},
    ]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    text = training_text(spec(str(path)), smollm2.tokenizer, tmp_path)
    assert text.scored is not None
    answered = smollm2.tokenizer.decode(text.tokens[text.scored].tolist())
    assert answered.startswith("Paris, by history.")
    assert "France" not in answered
    assert "assistant" not in answered
    assert "France" in smollm2.tokenizer.decode(text.tokens.tolist())


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2"),
        ({"instruction": "Add", "context": "", "response": "3", "category": "maths"}, "Add"),
        ({"system_prompt": "", "question": "Add", "response": "3"}, "Add"),
        ({"conversations": [{"from": "human", "value": "Add"}, {"from": "gpt", "value": "3"}]}, "Add"),
        ({"messages": [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "3"}]}, "Add"),
    ],
)
def test_rows_of_every_shape_are_read(row: dict[str, Any], question: str) -> None:
    assert chat_of(row) == (Message("user", question), Message("assistant", "3"))


def test_a_tokenizer_without_a_chat_format_gets_plain_roles() -> None:
    chat = (Message("user", "Add 1 2"), Message("assistant", "3"))
    assert pieces(chat, object()) == [("User: Add 1 2\n\nAssistant: ", False), ("3\n\n", True)]


ANNOUNCED_OTHERWISE = (
    "{% for m in messages %}{{ '<U>' if m.role == 'user' else '<A>' }}{{ m.content }}"
    "{{ '</s>' if m.role == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
LAST_TOLD_OTHERWISE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [ANNOUNCED_OTHERWISE, LAST_TOLD_OTHERWISE])
def test_only_answers_count_in_formats_that_announce_or_end_otherwise(template: str) -> None:
    chat = tuple(
        Message(role, text) for text, role in zip(("Q1", "A1", "Q2", "A2"), ("user", "assistant") * 2, strict=True)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})), eos_token="</s>")
    tokenizer.chat_template = template
    found = pieces(chat, tokenizer)
    whole = tokenizer.apply_chat_template([{"role": m.role, "content": m.content} for m in chat], tokenize=False)
    assert "".join(text for text, _ in found) == whole
    assert [text.removeprefix("<think></think>") for text, counts in found if counts] == ["A1</s>", "A2</s>"]


def test_a_format_that_takes_no_such_conversation_is_one_sentence() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})), eos_token="</s>")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="takes no such conversation: roles must alternate"):
        pieces((Message("user", "Q"), Message("assistant", "A")), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", "Few words.", "less than one window"),
        ("bad.jsonl", '{"messages": [{"role": "user"}]}', "line 1 of .* is no conversation"),
        ("word.jsonl", '{"messages": ["hi"]}', "line 1 of .* is no conversation"),
        ("none.jsonl", '{"messages": []}', "nothing to learn"),
        ("alone.jsonl", '{"messages": [{"role": "user", "content": "Q"}]}', "nothing to learn"),
        ("parts.jsonl", '{"messages": [{"role": "assistant", "content": [1]}]}', "a content that is no text"),
    ],
)
def test_text_that_cannot_be_used_is_refused(
    smollm2: LoadedModel, tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        training_text(spec(str(path)), smollm2.tokenizer, tmp_path)


def test_training_text_shares_no_eight_words_in_a_row_with_held_out_text() -> None:
    def runs(passage: str) -> set[tuple[str, ...]]:
        words = passage.lower().split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    heldout = set().union(*map(runs, load_corpus("heldout").passages))
    for name in ("reading", "papers"):
        assert not any(heldout & runs(passage) for passage in load_corpus(name).passages)
