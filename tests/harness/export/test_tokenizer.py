"""Tokenizers as GGUF metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.errors import UserError
from harness.export.tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, gguf_vocabulary

MakeTokenizer = Callable[..., Any]
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES_ONLY])


def test_byte_level_tokens_merges_and_types(tiny_tokenizer: MakeTokenizer) -> None:
    vocabulary = gguf_vocabulary(tiny_tokenizer(), 96)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "gpt-2")
    assert len(vocabulary.tokens) == len(vocabulary.types) == 96
    assert vocabulary.merges[:3] == ("t h", "th e", "Ġ the")
    begin = vocabulary.special_ids["bos"]
    assert vocabulary.tokens[begin] == "<|begin|>"
    assert vocabulary.types[begin] == TokenType.CONTROL
    assert vocabulary.types[0] == TokenType.NORMAL
    assert (vocabulary.tokens[95], vocabulary.types[95]) == ("[PAD95]", TokenType.UNUSED)
    assert not vocabulary.add_bos
    assert not vocabulary.scores


def test_sentencepiece_pieces_score_by_their_merge(tiny_tokenizer: MakeTokenizer) -> None:
    tokenizer = tiny_tokenizer("sentencepiece")
    vocabulary = gguf_vocabulary(tokenizer, 300)
    score = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    kind = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert vocabulary.model == "llama"
    assert score["th"] > score["the"] > score["▁the"] > score["▁a"] > score["in"] > score["▁an"]
    assert kind["<0x0A>"] == TokenType.BYTE
    assert kind["<s>"] == TokenType.CONTROL
    assert vocabulary.add_space_prefix
    assert not vocabulary.merges


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
         "smollm"),
        (split(QWEN2_PATTERN), "qwen2"),
    ],
)  # fmt: skip
def test_ways_of_splitting_have_names(pre_tokenizer: Any, name: str, tiny_tokenizer: MakeTokenizer) -> None:
    assert gguf_vocabulary(tiny_tokenizer("bytes", pre_tokenizer), 96).pre == name


def test_llama3_splitting_goes_with_ignored_merges(tiny_tokenizer: MakeTokenizer) -> None:
    tokenizer = tiny_tokenizer("bytes", split(LLAMA3_PATTERN))
    with pytest.raises(UserError, match="its way of splitting text"):
        gguf_vocabulary(tokenizer, 96)
    tokenizer.backend_tokenizer.model.ignore_merges = True
    assert gguf_vocabulary(tokenizer, 96).pre == "llama-bpe"


def test_other_splitting_is_refused(tiny_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="its way of splitting text"):
        gguf_vocabulary(tiny_tokenizer("bytes", split(r"\s+")), 96)


def test_other_models_than_bpe_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="WordLevel model, and only BPE"):
        gguf_vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 8)


def test_more_tokens_than_rows_are_refused(tiny_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="the embedding only 20 rows"):
        gguf_vocabulary(tiny_tokenizer(), 20)
