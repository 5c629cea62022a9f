"""Joining results folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.merging import Merged, merge
from harness.records import RunRecord
from harness.run_files import RECORD
from harness.store import Store


def stores(tmp_path: Path) -> list[Store]:
    return [Store(tmp_path / name) for name in ("into", "a", "b")]


def test_runs_are_copied_file_by_file(tmp_path: Path, put: Callable[[Store, str, float], RunRecord]) -> None:
    into, a, b = stores(tmp_path)
    records = [put(a, "flap", 0.5), put(b, "slicegpt", 0.4)]
    assert merge(into, [a, b]) == Merged(tuple(r.spec.run_id for r in records), known=0, differing=())
    for store, record in zip((a, b), records, strict=True):
        run_id = record.spec.run_id
        assert into.load(run_id) == record
        for file in store.folder(run_id).iterdir():
            assert (into.folder(run_id) / file.name).read_bytes() == file.read_bytes()


def test_a_run_that_is_there_stays_and_other_numbers_are_told(
    tmp_path: Path, put: Callable[[Store, str, float], RunRecord]
) -> None:
    into, a, b = stores(tmp_path)
    put(into, "flap", 0.5), put(a, "flap", 0.5)
    mine = put(into, "slicegpt", 0.5)
    put(b, "slicegpt", 0.3)
    assert merge(into, [a, b]) == Merged(copied=(), known=1, differing=(mine.spec.run_id,))
    assert into.load(mine.spec.run_id) == mine


def test_other_times_are_no_other_numbers(tmp_path: Path, put: Callable[[Store, str, float], RunRecord]) -> None:
    into, a, _ = stores(tmp_path)
    record = put(into, "flap", 0.5)
    a.write(record.model_copy(update={"phase_seconds": {"prune": 99.0}}), into.documents(record.spec.run_id))
    assert merge(into, [a]) == Merged(copied=(), known=1, differing=())


@pytest.mark.parametrize("failed_here", [True, False])
def test_a_failed_run_gives_way_to_one_that_did_not(
    tmp_path: Path, put: Callable[[Store, str, float], RunRecord], failed_here: bool
) -> None:
    into, a, _ = stores(tmp_path)
    record = put(a if failed_here else into, "flap", 0.5)
    (into if failed_here else a).write(RunRecord(spec=record.spec, status="failed", reason="killed"))
    assert merge(into, [a]) == Merged(
        copied=(record.spec.run_id,) * failed_here, known=int(not failed_here), differing=()
    )
    assert into.load(record.spec.run_id) == record


def test_a_corrupt_or_empty_folder_is_a_sentence(tmp_path: Path, put: Callable[[Store, str, float], RunRecord]) -> None:
    into, a, b = stores(tmp_path)
    (a.folder(put(a, "flap", 0.5).spec.run_id) / RECORD).write_text("{")
    with pytest.raises(UserError, match="is corrupt"):
        merge(into, [a])
    assert into.run_ids() == []
    with pytest.raises(UserError, match=r"no runs in .*b; name folders"):
        merge(into, [b])
