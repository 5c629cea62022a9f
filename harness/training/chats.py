"""Conversations to train on: a .jsonl of messages, or instruction data of the hub; only the answers count."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from harness.errors import UserError

Piece = tuple[str, bool]
"""Text, and whether its tokens' predictions count."""


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says at once."""

    role: str
    """system, user or assistant."""
    content: str


Chat = tuple[Message, ...]


class NotTextError(TypeError):
    """A turn of a conversation holds something else than text."""


@dataclass(frozen=True, slots=True)
class _HubChats:
    path: str
    split: str = "train"


_HUB = {
    "openorca": _HubChats("Open-Orca/OpenOrca"),
    "openhermes-2.5": _HubChats("teknium/OpenHermes-2.5"),
    "dolly-15k": _HubChats("databricks/databricks-dolly-15k"),
    "wildchat-1m": _HubChats("allenai/WildChat-1M"),
    "lmsys-chat-1m": _HubChats("lmsys/lmsys-chat-1m"),
    "ultrachat-200k": _HubChats("HuggingFaceH4/ultrachat_200k", "train_sft"),
    "ultrainteract": _HubChats("openbmb/UltraInteract_sft"),
    "alpaca-cleaned": _HubChats("yahma/alpaca-cleaned"),
    "openo1": _HubChats("O1-OPEN/OpenO1-SFT"),
}
"""Conversations of the hub by name: the nine sets that Adapt-Accel (arXiv:2502.03460) trains on."""

_TURNS = ("messages", "conversation", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}
_QUESTIONS, _CONTEXTS, _ANSWERS = ("instruction", "question"), ("input", "context"), ("output", "response")


def known_chats() -> tuple[str, ...]:
    """Conversations that have a name."""
    return tuple(_HUB)


def is_chats(source: str) -> bool:
    """Whether a source holds conversations: a known name, or a .jsonl whose first row has ``messages``."""
    if source in _HUB:
        return True
    if Path(source).suffix != ".jsonl" or not Path(source).is_file():
        return False
    with Path(source).open(encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), "")
    return '"messages"' in first


def load_chats(source: str, most: int) -> Iterator[Chat]:
    """At most ``most`` conversations of a source that ``is_chats``.

    Raises:
        UserError: a line is not a conversation, or the hub is out of reach.
    """
    return islice(_from_hub(source) if source in _HUB else _from_file(Path(source)), most)


def pieces(chat: Chat, tokenizer: Any) -> list[Piece]:
    """A conversation as text in the tokenizer's own chat format, cut where answers begin and end.

    A tokenizer without a format gets "Role: text" lines.

    Raises:
        UserError: the format tells nothing of an answer, or takes no such conversation.
    """
    whole = _rendered(chat, tokenizer, prompt=False)
    found: list[Piece] = []
    told = 0
    for i, message in enumerate(chat):
        if message.role == "assistant":
            start, end = _place(whole, told, chat, i, tokenizer)
            found += [(whole[told:start], False), (whole[start:end], True)]
            told = end
    found.append((whole[told:], False))
    return [(text, counts) for text, counts in found if text]


def _place(whole: str, told: int, chat: Chat, i: int, tokenizer: Any) -> tuple[int, int]:
    """Where an answer begins and ends, its end sign included, in a conversation of which ``told`` letters are behind.

    The words that announce it belong to the question. Formats may announce an answer otherwise than they tell it
    (with a sign for thinking, say), and tell the last one otherwise than those before.
    """
    prompt, until = _rendered(chat[:i], tokenizer, prompt=True), _rendered(chat[: i + 1], tokenizer, prompt=False)
    content = chat[i].content.rpartition("</think>")[2].strip()  # formats leave the thoughts of earlier answers out
    start = len(prompt) if whole.startswith(prompt) and len(prompt) >= told else whole.find(content, told)
    if start < 0:
        raise UserError("the tokenizer's chat format leaves out or changes an answer; train on text instead")
    if whole.startswith(until) and len(until) >= start:
        return start, len(until)
    end = whole.find(content, start) + len(content)
    sign = tokenizer.eos_token or ""
    return start, end + len(sign) * whole.startswith(sign, end)


def _rendered(chat: Chat, tokenizer: Any, *, prompt: bool) -> str:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": message.role, "content": message.content} for message in chat]
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise UserError(f"the tokenizer's chat format takes no such conversation: {error}") from error
        return text
    lines = "".join(f"{message.role.capitalize()}: {message.content}\n\n" for message in chat)
    return f"{lines}Assistant: " if prompt else lines


def _from_file(path: Path) -> Iterator[Chat]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield _answered(tuple(_turn(turn) for turn in json.loads(line.decode("utf-8-sig"))["messages"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"line {number} of {str(path)!r} is no conversation ({type(error).__name__}: {error}); write "
                    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
                ) from error


def _answered(chat: Chat) -> Chat:
    if not any(message.role == "assistant" for message in chat):
        raise ValueError("no answer of an assistant, so nothing to learn")
    return chat


def _from_hub(name: str) -> Iterator[Chat]:
    import datasets

    source = _HUB[name]
    try:
        for row in datasets.load_dataset(source.path, split=source.split, streaming=True):
            with contextlib.suppress(NotTextError):  # a turn without words
                yield chat_of(row)
    except OSError as error:
        raise UserError(
            f"the conversations {name!r} ({source.path} on the hub) cannot be reached: {type(error).__name__}; connect "
            "to the hub (some sets ask to accept their terms and `hf auth login`), or give a .jsonl of messages"
        ) from error


def chat_of(row: Mapping[str, Any]) -> Chat:
    """A row of any of the sets: a list of turns, or an instruction with its answer.

    Raises:
        KeyError: it is neither.
    """
    for turns in _TURNS:
        if turns in row:
            return tuple(_turn(turn) for turn in row[turns])
    system = [Message("system", row["system_prompt"])] if row.get("system_prompt") else []
    asked = [str(row[key]) for keys in (_QUESTIONS, _CONTEXTS) for key in keys if row.get(key)]
    answer = next(str(row[key]) for key in _ANSWERS if key in row)
    return (*system, Message("user", "\n\n".join(asked)), Message("assistant", answer))


def _turn(turn: Mapping[str, Any]) -> Message:
    role = str(turn.get("role") or turn["from"])
    content = turn["content"] if "content" in turn else turn["value"]
    if not isinstance(content, str):
        raise NotTextError(f"a content that is no text: {content!r}")
    return Message(_ROLES.get(role, role), content)
