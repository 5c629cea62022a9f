"""What scoring a comparison costs, as it is asked for and answered between processes. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.records import Basis, Dtype, EvaluationSpec, Frozen, ModelRef, ParamCounts


class CostUnknownError(Exception):
    """What scoring costs cannot be estimated; the message says why."""


class CostRequest(Frozen):
    """Which model is scored on what, and where."""

    model: ModelRef
    dtype: Dtype
    evaluation: EvaluationSpec
    device: str = "cpu"
    batch_tokens: int = 4096
    num_threads: int | None = None
    cache: Path | None = None
    """Folder of what the models of a comparison share; estimating leaves the tokens of the requests there."""


class ScoringCost(Frozen):
    """Of scoring one model of a comparison."""

    documents: dict[str, int]
    """Task or group -> documents."""
    num_tokens: int
    """Tokens that run through the layers: every shared beginning once."""
    num_scored: int
    """Positions at which the head is applied."""
    heldout_tokens: int
    params: ParamCounts
    """Of the dense model."""
    seconds_per_token: float
    """Through all layers of the dense model, measured on a layer of its shape."""
    seconds_per_row: float
    """Of the head over the whole vocabulary."""

    def seconds(self, sparsity: float, basis: Basis) -> float:
        """Scoring this model at one sparsity, its divergence from dense included.

        An estimate: the layers' time follows their parameters, and what long contexts cost in attention, loading and
        lm-eval's own work are left out.
        """
        removed = sparsity * self.params.on(basis) / self.params.on("non-embedding")
        tokens = (self.num_tokens + self.heldout_tokens) * self.seconds_per_token * max(0.0, 1 - removed)
        # On held-out text both heads give their distributions for the divergence, and the model's the loss as well.
        return tokens + (self.num_scored + 3 * self.heldout_tokens) * self.seconds_per_row


def describe_cost(model: str, cost: ScoringCost, targets: Sequence[tuple[float, Basis]]) -> str:
    """In a sentence, what scoring a model takes at some sparsities."""
    counts: dict[int, list[str]] = {}
    for task, count in cost.documents.items():
        counts.setdefault(count, []).append(task)
    documents = ", ".join(f"{count:,} of {', '.join(tasks)}" for count, tasks in counts.items())
    seconds = [cost.seconds(sparsity, basis) for sparsity, basis in targets]
    one = f"about {_duration(max(seconds))}"
    time = (
        f"{one} here" if len(targets) == 1 else f"{one} a model here, {_duration(sum(seconds))} for {len(targets)} runs"
    )
    return (
        f"Scoring {model}: {sum(cost.documents.values()):,} documents ({documents}) and {cost.heldout_tokens:,} "
        f"held-out tokens, {cost.num_tokens + cost.heldout_tokens:,} tokens to run with shared ones once: {time}. "
        "Pruning and loading come on top."
    )


def _duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
