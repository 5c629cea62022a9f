"""Recipes of Adapt-Accel runs, such as the paper's, and what a run will look like before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from adapt_pruner.accel import AdaptAccel
from adapt_pruner.sparsity import MAX_SPARSITY, SparsityState
from adapt_pruner.step import widths_after
from harness.budget import ParameterTarget, unreachable
from harness.errors import UserError, unknown_name
from harness.parsing import read_toml, refused
from harness.records import TrainingSpec
from harness.structure import ModelStructure
from harness.training.schedule import round_ends, shares


class Recipe(BaseModel):
    """A run of Adapt-Accel: what a recipe file may say."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = "smollm2-135m"
    """Catalog name, hub id or folder."""
    target_sparsity: float | None = None
    """Fraction of all parameters to remove."""
    target_params: int | None = None
    """Parameters to keep, instead of ``target_sparsity``."""
    rounds: int = 4
    tokens: int = 200_000
    """Trained on in all rounds together."""
    text: str = "reading"
    """What is trained on; sources joined by ``+``."""
    train: dict[str, JsonValue] = {}
    """Further settings of the training (``TrainingSpec``)."""
    params: dict[str, JsonValue] = {}
    """Further settings of the method (``AdaptAccel``)."""
    calibration: dict[str, JsonValue] = {}
    """``source``, ``num_samples``, ``num_tokens``."""


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by its name, or from a .toml file.

    Raises:
        UserError: there is none, or it says something that a recipe cannot.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if name_or_path not in recipe_names():
            raise unknown_name("recipe", name_or_path, recipe_names(), "harness accel --help")
        path = Path(str(_folder() / f"{name_or_path}.toml"))
    try:
        return Recipe(**read_toml(path))
    except ValidationError as error:
        raise refused(f"recipe {name_or_path}", error) from error


@dataclass(frozen=True)
class Round:
    """What is known of a round before it begins."""

    number: int
    params: int
    """Of the model it trains."""
    kv_heads: int
    """Of each layer, if all layers were alike; the real ones differ by their importance."""
    intermediate_size: int
    tokens: int
    steps: int


def forecast(
    method: AdaptAccel, dense: ModelStructure, target: ParameterTarget, training: TrainingSpec
) -> Iterator[Round]:
    """The rounds of a run.

    Raises:
        UserError: the target is beyond what the method can remove, or there are more rounds than steps.
    """
    total = max(training.tokens // training.batch_tokens, 1)
    if total < method.rounds:
        raise UserError(
            f"{training.tokens:,} tokens are {total} steps of {training.batch_tokens:,}, too few for {method.rounds} "
            "rounds; give more tokens, fewer rounds or smaller steps (--train batch_tokens=N)"
        )
    ends = round_ends(total, method.rounds, method.split)
    parts = shares(method.rounds, method.split)
    for i, goal in enumerate(method.goals(target)):
        heads, channels = _uniform_widths(method.name, dense, goal)
        steps = ends[i] - (ends[i - 1] if i else 0)
        yield Round(i + 1, goal.params, heads, channels, round(parts[i] * training.tokens), steps)


def _uniform_widths(name: str, dense: ModelStructure, goal: ParameterTarget) -> tuple[int, int]:
    """kv heads and channels of a layer at the smallest share for all layers that removes enough."""
    low, high = 0.0, MAX_SPARSITY
    if _removed(dense, high) < goal.to_remove:
        raise unreachable(name, goal, _removed(dense, high))
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if _removed(dense, middle) >= goal.to_remove else (middle, high)
    widths = _widths(dense, high)
    return widths[dense.attention[0].name], widths[dense.mlp[0].name]


def _widths(dense: ModelStructure, share: float) -> dict[str, int]:
    return widths_after(dense, SparsityState((share,) * dense.num_layers))


def _removed(dense: ModelStructure, share: float) -> int:
    widths = _widths(dense, share)
    return sum((group.num_units - widths[group.name]) * group.unit_params for group in dense.groups)


def _folder() -> Any:
    return files("adapt_pruner") / "recipes"
