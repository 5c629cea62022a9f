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
    rest: dict[Key, tuple[list[RunRecord], list[RunRecord]]] = {}
    for side, records in enumerate((ours, theirs)):
        for record in records.values():
            rest.setdefault(_key(record.spec), ([], []))[side].append(record)
    for pair in (pair for alike in rest.values() for pair in _closest(*alike)):
        pairs.append(pair)
        del ours[pair.reference.spec.run_id], theirs[pair.candidate.spec.run_id]
    if not pairs:
        raise UserError(
            f"no run of {candidate.shown} has the model, method, sparsity and seed of a run of {reference.shown}; "
            "`harness regress --run` makes the candidate by the reference's specs"
        )
    return Matching(tuple(sorted(pairs, key=lambda pair: pair.reference.spec.run_id)), tuple(ours), tuple(theirs))


def refuse_missing(matching: Matching) -> None:
    """Stop where a reference run has no counterpart.

    Raises:
        UserError: naming some, and how many there are.
    """
    missing = matching.only_reference
    if missing:
        rest = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise UserError(
            f"the candidate lacks runs of the reference: {', '.join(missing[:_NAMED])}{rest}; make them, or leave out "
            "--require-all to compare the others"
        )


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


def _closest(references: Sequence[RunRecord], candidates: Sequence[RunRecord]) -> list[Pair]:
    """Pairs of runs whose model, method, sparsity and seed are the same, those with the fewest differences first."""
    left = [_pair(reference, candidate) for reference in references for candidate in candidates]
    found = []
    while left:
        best = min(left, key=lambda pair: len(pair.differences))
        for rival in left:
            shares = (rival.reference is best.reference) != (rival.candidate is best.candidate)
            if shares and len(rival.differences) == len(best.differences):
                raise _undecided(best, rival)
        found.append(best)
        left = [p for p in left if p.reference is not best.reference and p.candidate is not best.candidate]
    return found


def _undecided(first: Pair, second: Pair) -> UserError:
    ours = dict.fromkeys(pair.reference.spec.run_id for pair in (first, second))
    theirs = dict.fromkeys(pair.candidate.spec.run_id for pair in (first, second))
    return UserError(
        f"{' and '.join(ours)} in the reference and {' and '.join(theirs)} in the candidate match equally well; keep "
        "one of the two"
    )


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
    # The build of a version (2.13.0+cpu) belongs to the machine, as its processor does.
    versions = {name: version.partition("+")[0] for name, version in provenance.packages.items()}
    return {
        **flatten(versions, "version of "),
        **flatten(provenance.data_fingerprints, "documents of "),
        "weights": provenance.weights_sha256[:12],
        "calibration tokens": str(provenance.calibration_sha256)[:12],
    }
