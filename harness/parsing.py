"""Words and numbers from the command line and from files, checked: what is wrong is said in one sentence."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import JsonValue, ValidationError

from harness.errors import UserError

MOST_SEED = 2**32 - 1
"""That every generator takes."""

Text = TypeVar("Text", bound=str)


def one_of(what: str, value: str, allowed: tuple[Text, ...]) -> Text:
    """``value``, if it is one of the allowed words.

    Raises:
        UserError: it is not.
    """
    for word in allowed:
        if value == word:
            return word
    raise UserError(f"{what} {value!r} is not known; pass one of {', '.join(allowed)}")


def large_number(what: str, value: Any) -> int:
    """``200k``, ``1.5M``, ``5B`` or a whole number, as a number.

    Raises:
        UserError: it is none of them, or not positive.
    """
    text = str(value).strip().lower()
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:], 1)
    try:
        number = round(float(text.rstrip("kmb")) * scale)
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise UserError(f"{what} {value!r} is not a number; pass one such as 200k, 1.5M or 120000")
    return number


def listed(value: Any) -> list[str]:
    """Comma-separated text, a list, or one value, as a list of texts without repeats.

    Raises:
        UserError: there is nothing in it.
    """
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    texts = list(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))
    if not texts:
        raise UserError("an empty list was given; name at least one")
    return texts


def whole_number(what: str, value: str) -> int:
    """A text as a number.

    Raises:
        UserError: it is not a whole one.
    """
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{what} {value!r} is not a whole number") from None


def one_seed(value: str) -> int:
    """A text as a seed.

    Raises:
        UserError: it is not a whole number from 0 to `MOST_SEED`.
    """
    seed = whole_number("seed", value)
    if not 0 <= seed <= MOST_SEED:
        raise UserError(f"seed {value} is not from 0 to {MOST_SEED}")
    return seed


def one_shard(value: str | None) -> tuple[int, int]:
    """``3/16`` as (3, 16): the third of sixteen parts; None is the only part.

    Raises:
        UserError: it is not of that form.
    """
    if value is None:
        return 1, 1
    part, _, parts = value.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"shard {value!r} is not K/N with K from 1 to N; pass one such as 3/16")
    return int(part), int(parts)


def json_value(text: str) -> JsonValue:
    """A text read as JSON; one that is not JSON is itself."""
    try:
        return cast(JsonValue, json.loads(text))
    except json.JSONDecodeError:
        return text


def refused(what: str, error: ValidationError) -> UserError:
    """The first of pydantic's complaints, in a sentence."""
    first = error.errors()[0]
    return UserError(f"{what}: {first['loc'][0]} = {first['input']!r} is not allowed; {first['msg'].lower()}")


def read_toml(path: Path) -> dict[str, Any]:
    """What a .toml file holds.

    Raises:
        UserError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); pass a .toml file to --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
