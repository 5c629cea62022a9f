"""Which run of a candidate answers which run of a reference, and what differs between the two besides the code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from harness.errors import UserError
from harness.records import Provenance, RunRecord, RunSpec, RunSummary
from harness.report.rows import flatten
from harness.store import Store

_NAMED = 4
"""Differences that a refusal spells out; it counts the rest."""

Key = tuple[str, str, float, int]


@dataclass(frozen=True, slots=True)
class Pair:
    """A reference run and the candidate run that is compared with it."""

    reference: RunRecord
    candidate: RunRecord
    differences: tuple[str, ...]
    """What else than the code differs, such as ``torch: 2.12.0 in the reference, 2.13.0 in the candidate``."""


@dataclass(frozen=True, slots=True)
class Matching:
    """Every reference run's counterpart."""

    pairs: tuple[Pair, ...]
    only_reference: tuple[str, ...]
    """Run ids without a counterpart."""
    only_candidate: tuple[str, ...]


def match(reference: Store, candidate: Store) -> Matching:
    """Pair runs by their spec, and those left over by model, method, sparsity and seed.

    Raises:
        UserError: a folder has no runs, nothing matches, or several candidate runs match equally well.
    """
    ours, theirs = _records(reference), _records(candidate)
    pairs = [_pair(ours.pop(run_id), theirs.pop(run_id)) for run_id in sorted(ours.keys() & theirs.keys())]
    rest: dict[Key, list[RunRecord]] = {}
    for record in theirs.values():
        rest.setdefault(_key(record.spec), []).append(record)
    for run_id, record in list(ours.items()):
        if found := rest.get(_key(record.spec)):
            pair = _closest(record, found)
            found.remove(pair.candidate)
            pairs.append(pair)
            del ours[run_id], theirs[pair.candidate.spec.run_id]
    if not pairs:
        raise UserError(
            f"no run of {candidate.shown} has the model, method, sparsity and seed of a run of {reference.shown}; "
            "`harness regress --run` makes the candidate by the reference's specs"
        )
    return Matching(tuple(sorted(pairs, key=lambda pair: pair.reference.spec.run_id)), tuple(ours), tuple(theirs))


def refuse_differences(pairs: Sequence[Pair]) -> None:
    """Stop where anything but the code differs.

    Raises:
        UserError: naming the differences and in how many runs they are.
    """
    found = count_differences(pairs)
    if found:
        rest = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise UserError(
            f"reference and candidate differ in more than the code: {'; '.join(found[:_NAMED])}{rest}. Make the "
            "reference again under the same conditions, or pass --allow-different to compare nevertheless"
        )


def count_differences(pairs: Sequence[Pair]) -> list[str]:
    """Every difference once, with the number of runs it is in, the most frequent first."""
    counted = Counter(difference for pair in pairs for difference in pair.differences)
    return [f"{text} ({count} of {len(pairs)} runs)" for text, count in counted.most_common()]


@cache
def _is_judged(measure: str) -> bool:
    """Whether a judge asks for it: the held-out loss, and which tasks have a length-normalised accuracy."""
    return measure == "heldout/ppl_token" or measure.endswith("/acc_norm")


def _records(store: Store) -> dict[str, RunSummary]:
    run_ids = store.run_ids()
    records = dict(zip(run_ids, store.summaries(run_ids, _is_judged), strict=True))
    if not records:
        raise UserError(f"{store.shown} has no runs; pass a results folder, as `harness compare --out` writes it")
    return records


def _key(spec: RunSpec) -> Key:
    return spec.model.name, spec.method, spec.sparsity, spec.seed


def _closest(reference: RunRecord, candidates: Sequence[RunRecord]) -> Pair:
    pairs = sorted((_pair(reference, candidate) for candidate in candidates), key=lambda pair: len(pair.differences))
    if len(pairs) > 1 and len(pairs[0].differences) == len(pairs[1].differences):
        names = " and ".join(pair.candidate.spec.run_id for pair in pairs[:2])
        raise UserError(
            f"{names} match the reference run {reference.spec.run_id} equally well; keep one of them in the candidate"
        )
    return pairs[0]


def _pair(reference: RunRecord, candidate: RunRecord) -> Pair:
    return Pair(reference, candidate, tuple(_differences(reference, candidate)))


def _differences(reference: RunRecord, candidate: RunRecord) -> Iterable[str]:
    origins = reference.provenance, candidate.provenance
    if reference.spec == candidate.spec and _parts(origins[0]) == _parts(origins[1]):
        return
    ours, theirs = (flatten(record.spec.model_dump(mode="json")) for record in (reference, candidate))
    if origins[0] and origins[1]:  # a run that failed early has none
        ours, theirs = ours | _origin(origins[0]), theirs | _origin(origins[1])
    for name in dict.fromkeys([*ours, *theirs]):
        here, there = ours.get(name, "none"), theirs.get(name, "none")
        if here != there:
            yield f"{name}: {here} in the reference, {there} in the candidate"


def _parts(provenance: Provenance | None) -> tuple[object, ...] | None:
    """What `_origin` tells in words."""
    if provenance is None:
        return None
    return provenance.packages, provenance.data_fingerprints, provenance.weights_sha256, provenance.calibration_sha256


def _origin(provenance: Provenance) -> dict[str, str]:
    return {
        **flatten(provenance.packages, "version of "),
        **flatten(provenance.data_fingerprints, "documents of "),
        "weights": provenance.weights_sha256[:12],
        "calibration tokens": str(provenance.calibration_sha256)[:12],
    }
