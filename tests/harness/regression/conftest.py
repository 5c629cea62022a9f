"""Two results folders: a reference, and a candidate made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from harness.records import RunRecord, RunSpec
from harness.store import Store


@pytest.fixture
def candidate(tmp_path: Path) -> Store:
    """An empty results folder beside ``store``, the reference."""
    return Store(tmp_path / "candidate")


@pytest.fixture
def add_pair(
    store: Store,
    candidate: Store,
    make_spec: Callable[..., RunSpec],
    make_documents: Callable[..., pd.DataFrame],
    make_record: Callable[..., RunRecord],
) -> Callable[..., tuple[RunRecord, RunRecord]]:
    """``add_pair(method, sparsity, lose, **fields of the candidate's record)`` writes a run into both folders.

    ``lose`` is task -> how many right answers (the first ones) are wrong in the candidate.
    """

    def add(
        method: str = "flap",
        sparsity: float = 0.2,
        lose: dict[str, int] | None = None,
        num_documents: int = 50,
        **changes: object,
    ) -> tuple[RunRecord, RunRecord]:
        spec = make_spec(method, sparsity)
        before = make_documents(spec, num_documents=num_documents)
        after = before.copy()
        for task, count in (lose or {}).items():
            right = after.index[(after["task"].str.startswith(task)) & (after["acc"] == 1.0)][:count]
            assert len(right) == count
            scored = [name for name in ("acc", "acc_norm") if after.loc[right, name].notna().all()]
            after.loc[right, scored] = 0.0
        records = make_record(spec, before), make_record(spec, after, **changes)
        store.write(records[0], before)
        candidate.write(records[1], after)
        return records

    return add
