"""A tokenizer as GGUF metadata: llama.cpp then makes the token ids that transformers makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from harness.errors import UserError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How sentencepiece spells a space."""


@dataclass(frozen=True)
class GgufVocabulary:
    """What llama.cpp must know to tokenize as the model's tokenizer does."""

    model: str
    """``gpt2``: byte-level BPE by merges; ``llama``: sentencepiece's BPE by scores."""
    pre: str
    """llama.cpp's name for how text is split before merging."""
    tokens: tuple[str, ...]
    """By id, as many as the embedding has rows."""
    types: tuple[int, ...]
    """``gguf.TokenType`` of each token."""
    merges: tuple[str, ...]
    """For ``gpt2``; by rank."""
    scores: tuple[float, ...]
    """For ``llama``; a higher one merges first."""
    special_ids: Mapping[str, int]
    """``bos``, ``eos``, ``unk``, ``pad`` -> id, where there is one."""
    add_bos: bool
    """Whether text is given a beginning-of-text token."""
    add_space_prefix: bool
    """Whether text is given a space before it (sentencepiece only)."""
    chat_template: str | None


def gguf_vocabulary(tokenizer: Any, vocab_size: int) -> GgufVocabulary:
    """Read a transformers tokenizer that is backed by the tokenizers library.

    Args:
        tokenizer: of the model; its ``backend_tokenizer`` is read.
        vocab_size: rows of the embedding; those without a token get an unused one.

    Raises:
        UserError: llama.cpp cannot tokenize like this, or there are more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported(f"{type(tokenizer).__name__} has no tokenizer.json")
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise _unsupported(f"its tokens come from a {spec['model']['type']} model, and only BPE can be written")
    by_bytes = not spec["model"].get("byte_fallback", False)
    tokens, types = _tokens(tokenizer, spec, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    return GgufVocabulary(
        model="gpt2" if by_bytes else "llama",
        pre=_byte_level_splitting(spec) if by_bytes else _sentencepiece_splitting(spec),
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(merges) if by_bytes else (),
        scores=() if by_bytes else tuple(_scores(tokens, merges)),
        special_ids=_special_ids(tokenizer),
        add_bos=_adds_bos(tokenizer),
        add_space_prefix=not by_bytes and "".join(backend.encode("a", add_special_tokens=False).tokens) == SPACE + "a",
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _tokens(tokenizer: Any, spec: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if max(vocabulary.values()) >= vocab_size:
        raise UserError(
            f"the tokenizer has token {max(vocabulary.values())} and the embedding only {vocab_size} rows; "
            "pass the tokenizer that belongs to the model"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in vocabulary.items():
        tokens[i] = token
        types[i] = int(TokenType.NORMAL)
    if spec["model"].get("byte_fallback", False):
        for byte in range(256):
            token = f"<0x{byte:02X}>"
            if token in vocabulary:
                types[vocabulary[token]] = int(TokenType.BYTE)
    for added in spec["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        types[added["id"]] = int(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Sentencepiece merges the pair whose union scores highest: minus the rank of the first merge that makes it."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _sentencepiece_splitting(spec: Mapping[str, Any]) -> str:
    """llama.cpp spells spaces as sentencepiece does and splits nothing."""
    splitting = spec["pre_tokenizer"]
    if splitting is None or (splitting["type"] == "Metaspace" and not splitting.get("split", True)):
        return "default"
    raise _unsupported(f"it splits text by {splitting['type']} before it merges, which sentencepiece does not")


def _byte_level_splitting(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of a byte-level BPE's splitting, recognised by what it does."""
    normalizer = spec["normalizer"]
    parts = spec["pre_tokenizer"] or {}
    parts = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    if kinds[-1] == "ByteLevel" and not last["add_prefix_space"] and (normalizer or {"type": "NFC"})["type"] == "NFC":
        first = parts[0]
        if kinds == ["ByteLevel"] and last["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and last["use_regex"] and first["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last["use_regex"] and first["behavior"] == "Isolated":
            pattern = first["pattern"].get("Regex")
            if pattern == LLAMA3_PATTERN and spec["model"].get("ignore_merges", False):
                return "llama-bpe"
            if pattern == QWEN2_PATTERN and not spec["model"].get("ignore_merges", False):
                return "qwen2"
    raise _unsupported(
        "its way of splitting text before merging is none of those known here (GPT-2, SmolLM, Llama 3, Qwen2)"
    )


def _special_ids(tokenizer: Any) -> dict[str, int]:
    names = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return {name: int(i) for name, i in names.items() if i is not None}


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer.encode("a")
    return bool(ids) and ids[0] == tokenizer.bos_token_id and tokenizer.encode("a", add_special_tokens=False) != ids


def _unsupported(reason: str) -> UserError:
    return UserError(f"this model cannot be written as GGUF: llama.cpp could not tokenize like its tokenizer: {reason}")
