"""Which runs make one row of a table, and which rows may be compared with each other."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.records import Provenance, RunRecord, RunSpec, Status

REFERENCE_METHOD = "dense"
"""The method whose rows the others are measured against, and which does not compete."""

_LONGEST_SETTING = 40
_SEEDS: Any = {"seed": True, "recovery": {"seed"}}
"""What the runs of one row differ in."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Runs that ended the same way and differ in nothing but their seed, sorted by it."""

    records: tuple[RunRecord, ...]
    contest: str
    """Equal for rows that compete: the same model, weights, precision, target, training and documents."""
    reference: str
    """Equal for rows whose scores may be subtracted: the same model, weights, precision and documents."""
    settings: str = ""
    """What tells this row from others of the same model, method, sparsity and basis; empty where there is none."""

    @property
    def spec(self) -> RunSpec:
        """Of the first seed."""
        return self.records[0].spec

    @property
    def training(self) -> str:
        """Equal for rows that were trained alike; empty for those that were not."""
        return _training_of(self.spec)

    @property
    def status(self) -> Status:
        """Of every run in the row."""
        return self.records[0].status

    @property
    def is_reference(self) -> bool:
        """Whether the row is outside the contest."""
        return self.spec.method == REFERENCE_METHOD


def group_rows(records: Iterable[RunRecord]) -> list[Row]:
    """One row per set of runs that differ only in their seed; rows that would look alike get their ``settings``."""
    groups: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        spec = record.spec.model_dump(mode="json", exclude=_SEEDS)
        groups[_key(spec, record.status, *_origin(record.provenance))].append(record)
    rows = [_row(sorted(group, key=lambda record: record.spec.seed)) for group in groups.values()]
    return _with_settings(rows)


def contests(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that compete with each other, contest by contest."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.contest].append(row)
    return list(found.values())


def dense_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """``Row.reference`` -> the dense row that such rows are measured against, where it was run."""
    return {row.reference: row for row in rows if row.is_reference and row.status == "ok"}


def evaluations(rows: Iterable[Row]) -> list[tuple[str, Row]]:
    """The first row of every set of documents, with what tells its evaluation from the others."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(_key(row.spec.evaluation.model_dump(mode="json"), _fingerprints(row)), row)
    flat = [flatten(row.spec.evaluation.model_dump(mode="json"), "evaluation.") for row in first.values()]
    origins = [{"data": _fingerprints(row)} for row in first.values()]
    return list(zip(_differences(flat, origins), first.values(), strict=True))


def _row(records: list[RunRecord]) -> Row:
    spec = records[0].spec
    origin = _origin(records[0].provenance)
    reference = _key(spec.model_dump(mode="json", include={"model", "dtype", "evaluation"}), *origin)
    contest = f"{reference} {spec.sparsity} {spec.basis} {_training_of(spec)}"
    return Row(tuple(records), contest, reference)


def _training_of(spec: RunSpec) -> str:
    return "" if spec.recovery is None else spec.recovery.model_dump_json(exclude={"seed"})


def _key(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True)


def _origin(provenance: Provenance | None) -> tuple[str | None, dict[str, str] | None]:
    """What may change under an unchanged spec: the weights behind a name and the documents behind a task."""
    return (provenance.weights_sha256, provenance.data_fingerprints) if provenance else (None, None)


def _fingerprints(row: Row) -> dict[str, str] | None:
    return _origin(row.records[0].provenance)[1]


def _with_settings(rows: Sequence[Row]) -> list[Row]:
    alike: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.spec.model.name, row.spec.method, row.spec.sparsity, row.spec.basis, row.training].append(row)
    settings: dict[Row, str] = {}
    for group in alike.values():
        settings |= dict(zip(group, _settings(group), strict=True))
    return [replace(row, settings=settings[row]) for row in rows]


def _settings(group: Sequence[Row]) -> list[str]:
    if len(group) == 1:
        return [""]
    told = {"seed", "method", "sparsity", "basis", "recovery"}
    flat = [_settings_of(row.spec.model_dump(mode="json", exclude=told)) for row in group]
    origins = [dict(zip(("weights", "data"), _origin(row.records[0].provenance), strict=True)) for row in group]
    return _differences(flat, origins)


def _settings_of(spec: dict[str, Any]) -> dict[str, str]:
    """Fields by name, those of the method as its own flags name them: ``rounds``, not ``method_params.rounds``."""
    params, rest = flatten(spec.pop("method_params")), flatten(spec)
    return {name if name not in rest else f"method_params.{name}": value for name, value in params.items()} | rest


def _differences(specs: Sequence[Mapping[str, str]], origins: Sequence[Mapping[str, object]]) -> list[str]:
    """Per item, the fields that are not the same in all of them; an unknown origin differs from nothing."""
    fields = dict.fromkeys(field for spec in specs for field in spec)
    differing = [field for field in fields if len({spec.get(field) for spec in specs}) > 1]
    texts = [[f"{field}={spec.get(field, 'unset')}" for field in differing] for spec in specs]
    for name in dict.fromkeys(name for origin in origins for name in origin):
        known = [None if origin[name] is None else _short(origin[name]) for origin in origins]
        if len(set(known) - {None}) > 1:
            for text, value in zip(texts, known, strict=True):
                text.append(f"{name}={value or 'unknown'}")
    return ["; ".join(text) for text in texts]


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"calibration": {"num_samples": 64}}`` as ``{"calibration.num_samples": "64"}``."""
    flat: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat.update(flatten(item, f"{prefix}{name}."))
        else:
            text = item if isinstance(item, str) else json.dumps(item)
            flat[prefix + name] = text if len(text) <= _LONGEST_SETTING else f"#{_short(text)}"
    return flat


def _short(value: object) -> str:
    return hashlib.sha256(_key(value).encode()).hexdigest()[:8]
