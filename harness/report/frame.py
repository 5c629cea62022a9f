"""The leaderboard as numbers: seeds aggregated, fractions and SI units, what is not known left empty."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from harness.records import ParamCounts, RunRecord
from harness.report.efficiency import COLUMNS as EFFICIENCY
from harness.report.efficiency import efficiency_line
from harness.report.rows import Row, evaluations
from harness.report.scores import COMMONSENSE, MMLU, Estimate, Guessing, RowScores
from harness.statistics import NORMAL_95, spread

CHANCE = "chance"
"""Method name of the lines that say what guessing scores."""

_LEADING = (
    "model", "method", "target_sparsity", "basis", "sparsity_total", "sparsity_non_embedding", "params_total", "status",
    "seeds",
)  # fmt: skip
_TRAILING = (
    "commonsense_avg", "commonsense_ci_low", "commonsense_ci_high", "delta_vs_dense", "mmlu", "ppl_token",
    "prune_seconds", "prune_peak_bytes", "eval_seconds", "run_ids",
)  # fmt: skip
_FURTHER = (
    "recovery", "recovery_tokens", "train_seconds", "train_peak_bytes",
    "settings", "reason", "best_or_tied", "p_vs_best", "commonsense_tasks", "commonsense_spread", "delta_ci_low",
    "delta_ci_high", "delta_p", "mmlu_ci_low", "mmlu_ci_high", "ppl_word", "kl_dense", "kl_dense_ci_low",
    "kl_dense_ci_high", "margin", "margin_ci_low", "margin_ci_high", "margin_delta", "margin_delta_ci_low",
    "margin_delta_ci_high", "eval_peak_bytes", "seed_values", "dtype", "knob", "tied_embeddings",
)  # fmt: skip
_COUNTS = ("params_total", "seeds", "recovery_tokens", "prune_peak_bytes", "train_peak_bytes", "eval_peak_bytes")

Line = dict[str, Any]


COLUMNS = (*_LEADING, *_TRAILING, *_FURTHER, *EFFICIENCY)
"""Names that no task's column may have."""


def task_columns(rows: Sequence[Row]) -> list[str]:
    """Tasks with a column of their own, in the order the evaluations name them: those scored by accuracy."""
    named = dict.fromkeys(task for row in rows for task in row.spec.evaluation.tasks if task != MMLU)
    measured = {m.name.rpartition("/")[0] for row in rows for record in row.records for m in record.measures}
    return [task for task in named if task in COMMONSENSE or task in measured]


def order_rows(rows: Iterable[Row], scores: Mapping[Row, RowScores]) -> list[Row]:
    """By precision (float32 first), training (none first), model, sparsity, basis; then, scored rows first, by contest
    and average from high to low."""

    def order(row: Row) -> tuple[object, ...]:
        found = scores.get(row, RowScores()).average
        average = round(found.value, 12) if found else float("-inf")
        spec = row.spec
        within = (row.status != "ok", not row.is_reference, row.contest, -average, spec.method, row.settings)
        return spec.dtype != "float32", spec.dtype, row.training, spec.model.name, spec.sparsity, spec.basis, *within

    return sorted(rows, key=order)


def build_frame(rows: Sequence[Row], scores: Mapping[Row, RowScores], tasks: Sequence[str]) -> pd.DataFrame:
    """A line for every chance level, then one for every row.

    Args:
        rows: of the table, in its order.
        scores: of the rows that have any.
        tasks: with a column of their own.
    """
    guessed = [(text, scores[row].guessing) for text, row in evaluations(row for row in rows if row in scores)]
    lines = [_chance_line(settings, guessing) for settings, guessing in guessed if guessing.tasks]
    lines += [_line(row, scores.get(row, RowScores()), tasks) for row in rows]
    intervals = [f"{task}_ci_{end}" for task in tasks for end in ("low", "high")]
    frame = pd.DataFrame(lines, columns=[*_LEADING, *tasks, *_TRAILING, *_FURTHER, *EFFICIENCY, *intervals])
    return frame.astype(dict.fromkeys(_COUNTS, "Int64") | {"tied_embeddings": "boolean"})


def _line(row: Row, scores: RowScores, tasks: Sequence[str]) -> Line:
    spec = row.spec
    line: Line = {
        "model": spec.model.name,
        "method": spec.method,
        "target_sparsity": spec.sparsity,
        "basis": spec.basis,
        "dtype": spec.dtype,
        "recovery": spec.recovery.mode if spec.recovery else "none",
        "recovery_tokens": spec.recovery.tokens if spec.recovery else None,
        "status": row.status,
        "seeds": len(row.records),
        "seed_values": " ".join(str(record.spec.seed) for record in row.records),
        "run_ids": " ".join(record.spec.run_id for record in row.records),
        "settings": row.settings or None,
        "reason": "; ".join(dict.fromkeys(record.reason for record in row.records if record.reason)) or None,
    }
    # A run that misses its target is not listed among the scores, whatever it measured.
    if row.status != "ok":
        return line
    return line | _counted(row) | _costs(row) | efficiency_line(row.records) | _scored(row, scores, tasks)


def _counted(row: Row) -> Line:
    pairs = [(r.params_before, r.params_after) for r in row.records if r.params_before and r.params_after]
    if not pairs:
        return {}
    ties = {record.tied_embeddings for record in row.records}
    return {
        "sparsity_total": _mean(1 - after.total / before.total for before, after in pairs),
        "sparsity_non_embedding": _mean(_removed_from_blocks(before, after) for before, after in pairs),
        "params_total": round(fmean(after.total for _, after in pairs)),
        "knob": _knob(row.records),
        "tied_embeddings": ties.pop() if len(ties) == 1 else None,
    }


def _removed_from_blocks(before: ParamCounts, after: ParamCounts) -> float:
    return 1 - after.on("non-embedding") / before.on("non-embedding")


def _knob(records: Sequence[RunRecord]) -> str | None:
    names = dict.fromkeys(name for record in records for name in record.knob)
    means = {name: _mean(record.knob[name] for record in records if name in record.knob) for name in names}
    return json.dumps({name: round(value or 0.0, 6) for name, value in means.items()}) if means else None


def _costs(row: Row) -> Line:
    line: Line = {}
    for phase, name in (("prune", "prune"), ("train", "train"), ("evaluate", "eval")):
        line[f"{name}_seconds"] = _mean(r.phase_seconds[phase] for r in row.records if phase in r.phase_seconds)
        line[f"{name}_peak_bytes"] = max(
            (r.peak_bytes[phase] for r in row.records if phase in r.peak_bytes), default=None
        )
    return line


def _scored(row: Row, scores: RowScores, tasks: Sequence[str]) -> Line:
    line: Line = {task: _primary_mean(row.records, task) for task in [*tasks, MMLU]}
    line["ppl_token"] = _measured_mean(row.records, "heldout/ppl_token")
    line["ppl_word"] = _measured_mean(row.records, "heldout/ppl_word")
    line |= _interval("kl_dense", _kl_dense(row.records))
    line |= _interval("margin", scores.margin)
    if scores.margin_delta:
        line |= _interval("margin_delta", Estimate(scores.margin_delta.value, *scores.margin_delta.interval))
    line |= _estimated(scores.tasks, scores.average)
    line |= {"commonsense_tasks": len(scores.averaged_tasks) or None, "commonsense_spread": scores.spread}
    if scores.delta:
        low, high = scores.delta.interval
        line |= {"delta_vs_dense": scores.delta.value, "delta_ci_low": low, "delta_ci_high": high}
        line["delta_p"] = scores.delta.p_value
    return line | {"best_or_tied": scores.mark or None, "p_vs_best": scores.p_vs_best}


def _chance_line(settings: str, guessing: Guessing) -> Line:
    line: Line = {"method": CHANCE, "status": "reference", "settings": settings or None}
    return line | _estimated(guessing.tasks, guessing.average)


def _interval(name: str, estimate: Estimate | None) -> Line:
    if estimate is None:
        return {}
    return {name: estimate.value, f"{name}_ci_low": estimate.low, f"{name}_ci_high": estimate.high}


def _kl_dense(records: Sequence[RunRecord]) -> Estimate | None:
    """Mean over seeds of the divergence from the dense model; its interval over windows of the text, and seeds."""
    found = [measure for record in records if (measure := record.measure("heldout/kl_dense"))]
    if len(found) < len(records):
        return None
    value = fmean(measure.value for measure in found)
    # Every seed reads the same text, so the error over its windows does not shrink with seeds; that over seeds does.
    over_text = fmean(measure.stderr or 0.0 for measure in found)
    over_seeds = (spread([measure.value for measure in found]) or 0.0) / len(found) ** 0.5
    half = NORMAL_95 * (over_text**2 + over_seeds**2) ** 0.5
    return Estimate(value, value - half, value + half)


def _estimated(tasks: Mapping[str, Estimate], average: Estimate | None) -> Line:
    line: Line = {}
    for task, (value, low, high) in tasks.items():
        line |= {task: value, f"{task}_ci_low": low, f"{task}_ci_high": high}
    if average:
        value, low, high = average
        line |= {"commonsense_avg": value, "commonsense_ci_low": low, "commonsense_ci_high": high}
    return line


def _primary_mean(records: Sequence[RunRecord], task: str) -> float | None:
    """Mean over seeds of acc_norm where the task has it, else of acc."""
    value = _measured_mean(records, f"{task}/acc_norm") if task != MMLU else None
    return _measured_mean(records, f"{task}/acc") if value is None else value


def _measured_mean(records: Sequence[RunRecord], name: str) -> float | None:
    """Mean over seeds of a measure; None where no run took it."""
    return _mean(measure.value for record in records if (measure := record.measure(name)))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None
