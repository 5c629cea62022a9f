"""The README.md of a saved model: base, method, settings, counted sizes, and the scores of the run that it equals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import JsonValue

from harness.budget import ParameterTarget
from harness.records import CalibrationSpec, Dtype, LayerWidths, ModelRef, ParamCounts, RunRecord, TrainingSpec


@dataclass(frozen=True)
class Origin:
    """Everything that decides what a pruned model is."""

    model: ModelRef
    method: str
    params: dict[str, JsonValue]
    """Every hyper-parameter of the method."""
    target: ParameterTarget
    seed: int
    dtype: Dtype
    calibration: CalibrationSpec | None
    """None for methods that look at no data."""
    weights_sha256: str
    """Of the dense checkpoint."""
    training: TrainingSpec | None = None
    """How it was trained after pruning or between its steps; None where it was not."""

    def is_that_of(self, record: RunRecord) -> bool:
        """Whether a scored run pruned the same weights in the same way."""
        spec = record.spec
        return (
            record.status == "ok"
            and record.provenance is not None
            and record.provenance.weights_sha256 == self.weights_sha256
            and (spec.method, spec.method_params, spec.seed, spec.dtype, spec.calibration)
            == (self.method, self.params, self.seed, self.dtype, self.calibration)
            and spec.recovery == self.training
            and (spec.sparsity, spec.basis) == (self.target.sparsity, self.target.basis)
            and (spec.round_to or 1, bool(spec.uniform)) == (self.target.round_to, self.target.uniform)
        )


@dataclass(frozen=True)
class Outcome:
    """What pruning gave."""

    params: ParamCounts
    layers: tuple[LayerWidths, ...]
    knob: dict[str, float]
    class_name: str
    tied: bool

    def is_that_of(self, record: RunRecord) -> bool:
        """Whether a run ended with the same counted sizes."""
        return record.params_after == self.params and record.layers == self.layers


def matching(records: Iterable[RunRecord], origin: Origin, outcome: Outcome) -> list[RunRecord]:
    """The runs that scored this very model, however they were evaluated."""
    return [record for record in records if origin.is_that_of(record) and outcome.is_that_of(record)]


def model_card(origin: Origin, outcome: Outcome, records: Iterable[RunRecord]) -> str:
    """Text of the card.

    Args:
        origin: what was pruned, and how.
        outcome: what came of it.
        records: the runs whose scores the card shows.
    """
    return "\n\n".join(
        (
            _front_matter(origin),
            f"# {origin.model.name}, {origin.target.sparsity:.0%} pruned with {origin.method}",
            _sizes(origin, outcome),
            _settings(origin, outcome),
            _scores(list(records)),
            _loading(outcome),
        )
    ) + "\n"  # fmt: skip


def _front_matter(origin: Origin) -> str:
    return f"---\nlibrary_name: transformers\nbase_model: {origin.model.name}\ntags: [pruning, {origin.method}]\n---"


def _sizes(origin: Origin, outcome: Outcome) -> str:
    dense, pruned = origin.target.dense, outcome.params
    rows = [("all parameters", dense.total, pruned.total)]
    rows += [("without embeddings", dense.on("non-embedding"), pruned.on("non-embedding"))]
    names = ("embedding", "attention", "mlp", "extra")
    rows += [(name, getattr(dense, name), getattr(pruned, name)) for name in names]
    lines = ["| parameters, counted | dense | pruned | removed |", "|---|---:|---:|---:|"]
    lines += [f"| {n} | {a:,} | {b:,} | {1 - b / a if a else 0:.2%} |" for n, a, b in rows]
    heads = [layer.num_key_value_heads for layer in outcome.layers]
    widths = [layer.intermediate_size for layer in outcome.layers]
    tied = "tied" if outcome.tied else "untied"
    lines += ["", f"Embeddings are {tied}. kv heads by layer: {heads}. MLP widths by layer: {widths}."]
    return "\n".join(lines)


def _settings(origin: Origin, outcome: Outcome) -> str:
    asked = {
        "sparsity": f"{origin.target.sparsity:g} of the {origin.target.basis} parameters",
        "widths": _rounding(origin.target),
        "seed": origin.seed,
        "dtype": origin.dtype,
        "calibration": _calibration(origin.calibration),
        "base revision": origin.model.revision or "not pinned",
        "base weights, SHA-256": origin.weights_sha256,
    }
    lines = [f"## Settings of {origin.method}", ""]
    lines += [f"- {name}: {value}" for name, value in {**asked, **origin.params}.items()]
    if origin.training is not None:
        lines += ["", "Training:", ""]
        lines += [f"- {name}: {value}" for name, value in origin.training.model_dump(mode="json").items()]
    if outcome.knob:
        lines += ["", "Solved for the counted size:", ""]
        lines += [f"- {name}: {value:g}" for name, value in outcome.knob.items()]
    return "\n".join(lines)


def _rounding(target: ParameterTarget) -> str:
    free = "free" if target.round_to == 1 else f"multiples of {target.round_to}"
    return f"{free}, one for all layers" if target.uniform else free


def _calibration(spec: CalibrationSpec | None) -> str:
    return "none" if spec is None else f"{spec.num_samples} x {spec.num_tokens} tokens of {spec.source}"


def _scores(records: list[RunRecord]) -> str:
    if not records:
        return "## Scores\n\nNo run with these settings was on record when this folder was written."
    parts = ["## Scores"]
    for record in records:
        assert record.provenance is not None, "a run without provenance matches nothing"
        commit = record.provenance.commit or "no commit"
        evaluation = record.spec.evaluation
        told = f"{evaluation.limit} documents a task" if evaluation.limit else "all documents"
        parts.append(f"Run `{record.spec.run_id}` ({told}; harness {record.provenance.harness_version}, {commit}):")
        lines = ["| measure | value | ± | documents | chance |", "|---|---:|---:|---:|---:|"]
        for m in record.measures:
            cells = ("" if c is None else f"{c:.4g}" for c in (m.stderr, m.num_examples, m.chance))
            lines.append(f"| {m.name} | {m.value:.4f} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _loading(outcome: Outcome) -> str:
    text = "## Loading\n\n`AutoModelForCausalLM.from_pretrained(folder)`"
    if not outcome.class_name.startswith("Pruned"):
        return f"{text}: a stock {outcome.class_name}."
    return f"{text} where adapt-pruner-harness is installed, and with `trust_remote_code=True` where it is not."
