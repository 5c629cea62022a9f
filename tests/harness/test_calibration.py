"""Calibration tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from harness.calibration import draw_calibration
from harness.errors import UserError
from harness.models import LoadedModel
from harness.records import CalibrationSpec


def test_the_seed_chooses_the_tokens_and_the_hash_names_them(smollm2: LoadedModel) -> None:
    spec = CalibrationSpec(num_samples=4, num_tokens=32)
    first, again, other = (draw_calibration(spec, smollm2.tokenizer, seed) for seed in (0, 0, 1))
    assert first.tokens.shape == (4, 32)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    expected = hashlib.sha256(b"".join(int(i).to_bytes(8, "little") for i in first.tokens.flatten())).hexdigest()
    assert first.sha256 == expected


def test_the_tokens_are_the_texts_own(smollm2: LoadedModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again and again.")
    drawn = draw_calibration(CalibrationSpec(source=str(text), num_samples=2, num_tokens=5), smollm2.tokenizer, 0)
    assert smollm2.tokenizer.decode(drawn.tokens.flatten().tolist()) == "The quick brown fox jumps over the lazy dog,"


def test_too_little_text_says_how_much_there_is(smollm2: LoadedModel, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    spec = CalibrationSpec(source=str(text), num_samples=8, num_tokens=16)
    with pytest.raises(UserError, match=r"has 4 tokens of the 128 asked for"):
        draw_calibration(spec, smollm2.tokenizer, 0)


def test_sequences_beyond_the_models_length_are_refused(smollm2: LoadedModel) -> None:
    spec = CalibrationSpec(num_samples=1, num_tokens=64)
    with pytest.raises(UserError, match="longer than the 32 that the model takes"):
        draw_calibration(spec, smollm2.tokenizer, 0, max_length=32)


def test_wikipedia_is_what_boolq_asks_about(smollm2: LoadedModel) -> None:
    drawn = draw_calibration(CalibrationSpec(num_samples=1, num_tokens=8), smollm2.tokenizer, 0)
    assert drawn.evaluated_tasks == {"boolq"}
