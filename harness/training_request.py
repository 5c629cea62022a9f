"""From flags to checked settings of a training."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from harness.errors import UserError, unknown_name
from harness.parsing import json_value, large_number, listed, one_of, refused
from harness.records import TrainingSpec

RECOVERIES = ("none", "lora", "full")
"""How a pruned model is trained: not at all, by low-rank updates, or all of it."""

LORA_RATE = 1e-4
"""Learning rate of low-rank updates where none is given. Source: LLM-Pruner (arXiv:2305.11627), section 4.1."""


def recovery_specs(modes: Any, tokens: Any, text: str, changes: list[str]) -> tuple[TrainingSpec | None, ...]:
    """Checked trainings: one per mode, alike but for the learning rate.

    Args:
        modes: of ``RECOVERIES``, comma-separated or listed.
        tokens: of every training, such as ``200k``.
        text: what it reads.
        changes: other settings as ``name=value``, for every mode.

    Raises:
        UserError: an unknown mode or setting, or a value that is not allowed.
    """
    chosen = [one_of("recovery", mode, RECOVERIES) for mode in listed(modes)]
    return tuple(None if mode == "none" else training_spec(mode, tokens, text, changes) for mode in chosen)


def training_spec(mode: str, tokens: Any, text: str, changes: list[str]) -> TrainingSpec:
    """One checked training; see ``recovery_specs``."""
    values: dict[str, Any] = {"learning_rate": LORA_RATE} if mode == "lora" else {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"--train {change!r} is not of the form setting=value, such as learning_rate=1e-4")
        allowed = TrainingSpec.model_fields.keys() - {"tokens", "mode", "source", "seed"}
        if name not in allowed:
            raise unknown_name("training setting", name, allowed, "docs/training.md")
        values[name] = json_value(value)
    try:
        spec = TrainingSpec(
            **{**values, "mode": mode, "tokens": large_number("training tokens", tokens), "source": text}
        )
    except ValidationError as error:
        raise refused("training", error) from error
    if spec.batch_tokens % spec.context_length:
        whole = -(-spec.batch_tokens // spec.context_length) * spec.context_length
        raise UserError(
            f"batch_tokens {spec.batch_tokens} is no multiple of context_length {spec.context_length}, so that steps "
            f"would not read what was asked for; pass --train batch_tokens={whole}"
        )
    return spec
