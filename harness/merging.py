"""Joining results folders: the parts of a comparison that several machines made. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import UserError
from harness.records import RunRecord
from harness.store import Store


@dataclass(frozen=True)
class Merged:
    """What became of the runs."""

    copied: tuple[str, ...]
    """Ids of those that the target has from the others now."""
    known: int
    """Those that the target held already, with the same numbers."""
    differing: tuple[str, ...]
    """Ids of those that the target held already with other numbers; the target's stay."""


def merge(into: Store, others: Sequence[Store]) -> Merged:
    """Copy the runs of other stores into one, their files as they are.

    Of two records of one run, one that ``failed`` gives way to one that did not; otherwise the one in ``into`` stays.

    Args:
        into: the target; may hold runs already.
        others: read in this order.

    Raises:
        UserError: a folder has no runs, a record is corrupt, or the target cannot be written to. Whole runs that were
            copied before stay.
    """
    known = 0
    copied: list[str] = []
    differing: list[str] = []
    here = set(into.run_ids())
    for other in others:
        run_ids = other.run_ids()
        if not run_ids:
            raise UserError(f"no runs in {other.shown}; name folders that `harness compare --out` wrote")
        for run_id in run_ids:
            theirs = other.load(run_id)
            ours = into.load(run_id) if run_id in here else None
            if ours is None or (ours.status == "failed" and theirs.status != "failed"):
                into.adopt(other, run_id)
                here.add(run_id)
                copied.append(run_id)
            elif theirs.status == "failed" or _numbers(ours) == _numbers(theirs):
                known += 1
            else:
                differing.append(run_id)
    return Merged(tuple(copied), known, tuple(differing))


def _numbers(record: RunRecord) -> tuple[object, ...]:
    """What repeats from run to run: no times and no memory."""
    measures = {m.name: m.value for m in record.measures if not m.name.startswith("efficiency/")}
    return record.status, record.params_after, tuple(sorted(measures.items()))
