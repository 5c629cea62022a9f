"""What running the models costs, in the table and under it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.records import EfficiencySpec, Measure, RunRecord
from harness.report import build_leaderboard
from harness.report.efficiency import COLUMNS
from harness.store import Store

REFERENCE = Path(__file__).parents[3] / "results" / "reference" / "ci"
VALUES = {
    "macs_per_token": 139e6,
    "weight_bytes": 512 * 2**20,
    "inference_peak_bytes": 520 * 2**20,
    "first_token_seconds": 0.25,
    "prefill_tokens_per_second": 512.0,
    "prefill_vs_dense": 1.25,
    "decode_tokens_per_second": 21.5,
    "decode_vs_dense": 0.98,
}


def measures(factor: float = 1.0) -> tuple[Measure, ...]:
    return tuple(
        Measure(name=COLUMNS[name], value=factor * value, unit="", higher_is_better=True)
        for name, value in VALUES.items()
    )


@pytest.fixture
def timed(store: Store, make_spec: Callable[..., Any], make_record: Callable[..., RunRecord]) -> Store:
    """FLAP with two seeds, timed."""
    for seed, factor in ((0, 1.0), (1, 3.0)):
        spec = make_spec("flap", 0.2, seed=seed, efficiency=EfficiencySpec(prompt_tokens=32, new_tokens=8))
        store.write(make_record(spec, measures=measures(factor)))
    return store


def test_columns_are_means_over_seeds(timed: Store) -> None:
    row = build_leaderboard(timed).frame.set_index("method").loc["flap"]
    assert {name: row[name] for name in COLUMNS} == pytest.approx({name: 2 * value for name, value in VALUES.items()})


def test_people_read_the_speed_beside_its_ratio_to_dense(timed: Store) -> None:
    cells = {c.heading: [cell.text for cell in c.cells] for c in build_leaderboard(timed).sections[0].columns}
    assert cells["MMACs/token"] == ["278.0"]
    assert cells["weights MiB"] == ["1,024.0"]
    assert cells["first token ms"] == ["500.0"]
    assert cells["prefill tokens/s (x dense)"] == ["1,024.0 (2.50)"]
    assert cells["decode tokens/s (x dense)"] == ["43.0 (1.96)"]


def test_note_states_batch_and_lengths(timed: Store) -> None:
    found = [note for note in build_leaderboard(timed).notes if note.startswith("Efficiency")]
    assert len(found) == 1
    assert "batch 1: 32 prompt tokens, then 8 more" in found[0]


def test_records_without_these_measures_stay_readable_and_get_no_columns() -> None:
    leaderboard = build_leaderboard(Store(REFERENCE))
    assert not leaderboard.frame.empty
    assert leaderboard.frame[list(COLUMNS)].isna().all(axis=None)
    headings = {column.heading for column in leaderboard.sections[0].columns}
    assert not any("MACs" in heading or "x dense" in heading for heading in headings)
    assert not any(note.startswith("Efficiency") for note in leaderboard.notes)


def test_run_ids_of_older_records_stay_as_they_are() -> None:
    store = Store(REFERENCE)
    assert [store.load(run_id).spec.run_id for run_id in store.run_ids()] == list(store.run_ids())
