"""How a comparison becomes tracks, and what happens when some are done, fail or are killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.compare import Comparison, compare, expand
from harness.cost import CostRequest, ScoringCost
from harness.errors import UserError
from harness.executors import LocalExecutor
from harness.records import CalibrationSpec, EvaluationSpec, ModelRef, ParamCounts, RunRecord, TrainingSpec
from harness.store import Store
from harness.track import Event, Track

EVALUATION = EvaluationSpec(tasks=("arc_easy",), limit=2, heldout_tokens=64, heldout_length=32)


def comparison(*methods: str, sparsities: tuple[float, ...] = (0.1, 0.2), seeds: tuple[int, ...] = (0,)) -> Comparison:
    return Comparison(
        models=(ModelRef(name="smollm2-135m"),),
        methods=methods,
        sparsities=sparsities,
        seeds=seeds,
        calibration=CalibrationSpec(num_samples=2, num_tokens=32),
        evaluation=EVALUATION,
    )


class Recorder:
    """An executor that writes a record for every run of a track, and remembers the tracks."""

    num_workers = 1

    def __init__(self, store: Store) -> None:
        self.store = store
        self.stopped = False
        self.tracks: list[Track] = []

    def cost(self, request: CostRequest) -> ScoringCost:
        params = ParamCounts(total=1200, embedding=200, attention=400, mlp=600, extra=0)
        return ScoringCost(
            documents={"arc_easy": 2}, num_tokens=900, num_scored=50, heldout_tokens=100, params=params,
            seconds_per_token=0.1, seconds_per_row=0.2,
        )  # fmt: skip

    def run(self, track: Track, on_event: Callable[[Event], None]) -> None:
        self.tracks.append(track)
        for spec in track.specs:
            self.store.write(RunRecord(spec=spec, status="unsupported", reason="only a test"), None)

    def stop(self) -> None:
        self.stopped = True


def test_runs_that_differ_in_sparsity_alone_share_a_track_in_rising_order() -> None:
    tracks = expand(comparison("flap", "slicegpt", sparsities=(0.4, 0.2), seeds=(0, 1)))
    assert [[(s.method, s.seed, s.sparsity) for s in track] for track in tracks] == [
        [("flap", 0, 0.2), ("flap", 0, 0.4)],
        [("flap", 1, 0.2), ("flap", 1, 0.4)],
        [("slicegpt", 0, 0.2), ("slicegpt", 0, 0.4)],
        [("slicegpt", 1, 0.2), ("slicegpt", 1, 0.4)],
    ]


def test_dense_is_one_run_whatever_the_seeds_sparsities_and_calibration() -> None:
    tracks = expand(comparison("dense", seeds=(3, 4)))
    assert [(s.sparsity, s.seed, s.calibration) for track in tracks for s in track] == [(0.0, 0, None)]


def test_run_ids_do_not_collide_and_name_what_they_are() -> None:
    specs = [spec for track in expand(comparison("flap", "random", seeds=(0, 1))) for spec in track]
    assert len({spec.run_id for spec in specs}) == len(specs) == 8
    assert specs[0].run_id.startswith("smollm2-135m--flap--s0.10--")


def test_a_second_run_makes_only_what_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = Recorder(store), Recorder(store)
    compare(comparison("flap", sparsities=(0.1,)), store, first, lambda _event: None)
    compare(comparison("flap", "magnitude"), store, second, lambda _event: None)
    assert [[(s.method, s.sparsity) for s in track.specs] for track in second.tracks] == [
        [("flap", 0.2)],
        [("magnitude", 0.1), ("magnitude", 0.2)],
    ]


def test_force_makes_everything_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    again = Recorder(store)
    compare(comparison("flap"), store, Recorder(store), lambda _event: None)
    compare(comparison("flap"), store, again, lambda _event: None, force=True)
    assert [len(track.specs) for track in again.tracks] == [2]


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_shards_make_every_run_once(tmp_path: Path, parts: int) -> None:
    asked, store = comparison("dense", "flap", "random", "slicegpt", seeds=(0, 1)), Store(tmp_path)
    executors = [Recorder(store) for _ in range(parts)]
    for part, executor in enumerate(executors, start=1):
        if part <= len(expand(asked)):  # more parts than tracks leave some without work
            compare(asked, store, executor, lambda _event: None, shard=(part, parts))
    made = [spec.run_id for executor in executors for track in executor.tracks for spec in track.specs]
    assert sorted(made) == sorted(spec.run_id for track in expand(asked) for spec in track)
    assert max(len(executor.tracks) for executor in executors) == -(-len(expand(asked)) // parts)


def test_a_shard_without_work_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shard 3/5 has no runs: there are 2 tracks"):
        compare(comparison("flap", "random"), Store(tmp_path), Recorder(Store(tmp_path)), print, shard=(3, 5))


def test_processes_that_share_a_folder_take_different_tracks(tmp_path: Path) -> None:
    asked = comparison("flap", "random", "slicegpt", "magnitude", sparsities=(0.1,), seeds=(0, 1))
    made: list[str] = []

    class Slow(Recorder):
        def run(self, track: Track, on_event: Callable[[Event], None]) -> None:
            time.sleep(0.05)
            made.append(track.track_id)
            super().run(track, on_event)

    def work() -> None:
        store = Store(tmp_path)  # each with leases of its own, as another process has
        compare(asked, store, Slow(store), lambda _event: None)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(made) == sorted(track[0].run_id for track in expand(asked))


def test_an_executor_with_several_workers_gets_several_tracks_at_once(tmp_path: Path) -> None:
    asked = comparison("flap", "random", "slicegpt", sparsities=(0.1,))
    together = threading.Barrier(3, timeout=30)

    class Wide(Recorder):
        num_workers = 3

        def run(self, track: Track, on_event: Callable[[Event], None]) -> None:
            together.wait()  # passes only if all three are here
            super().run(track, on_event)

    store = Store(tmp_path)
    leaderboard = compare(asked, store, Wide(store), lambda _event: None)
    assert len(leaderboard.rows) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_track_cannot_mend_ends_the_comparison(tmp_path: Path, workers: int) -> None:
    class Refusing(Recorder):
        num_workers = workers

        def run(self, track: Track, on_event: Callable[[Event], None]) -> None:
            raise UserError("too little text")

    executor = Refusing(Store(tmp_path))
    with pytest.raises(UserError, match="too little text"):
        compare(comparison("flap", "random"), Store(tmp_path), executor, lambda _event: None)
    assert executor.stopped


def test_a_process_that_is_killed_leaves_failed_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The child kills itself as it imports pandas: no record of its own can be written.
    (tmp_path / "pandas.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    specs = tuple(spec for track in expand(comparison("magnitude")) for spec in track)
    LocalExecutor().run(Track(specs=specs, out=tmp_path / "results"), lambda _event: None)
    store = Store(tmp_path / "results")
    assert [record.status for record in store.records()] == ["failed", "failed"]
    assert "ended with code -9" in str(next(store.records()).reason)
    assert store.missing(specs) == list(specs)


WRITES_AND_DIES = """
import os, signal, sys
if "harness.runner" in sys.orig_argv:
    from pathlib import Path
    from harness.records import RunRecord
    from harness.store import Store
    from harness.track import Track
    track = Track.model_validate_json(Path(sys.orig_argv[3]).read_text())
    Store(track.out).write(RunRecord(spec=track.specs[0], status="ok"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_was_written_before_its_process_was_killed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRITES_AND_DIES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    specs = tuple(spec for track in expand(comparison("magnitude")) for spec in track)
    told: list[Event] = []
    store = Store(tmp_path / "results")
    for _again in range(2):  # the second time its record is there before
        told.clear()
        LocalExecutor().run(Track(specs=specs, out=store.root), told.append)
        assert [store.load(spec.run_id).status for spec in specs] == ["ok", "failed"]
        assert [(event.kind, event.run_id) for event in told] == [("finished", specs[0].run_id)]


def test_a_log_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    specs = tuple(spec for track in expand(comparison("magnitude")) for spec in track)
    track = Track(specs=specs, out=tmp_path)
    (tmp_path / "tracks" / f"{track.track_id}.log").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write to the folder"):
        LocalExecutor().run(track, lambda _event: None)


def test_the_cost_is_told_before_anything_runs_and_only_of_what_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    told: list[str] = []
    executor = Recorder(store)

    def tell(sentence: str) -> None:
        assert executor.tracks == []
        told.append(sentence)

    compare(comparison("dense", "flap"), store, executor, lambda _event: None, on_cost=tell)
    # 1000 tokens x 0.1 s, and (50 + 3 x 100) head rows x 0.2 s; 10% of 1200
    # parameters are 12% of the layers' 1000: 170 + 158 + 146 s.
    assert told == [
        "Scoring smollm2-135m: 2 documents (2 of arc_easy) and 100 held-out tokens, 1,000 tokens to run with shared "
        "ones once: about 3 min a model here, 8 min for 3 runs. Pruning and loading come on top."
    ]
    compare(comparison("dense", "flap"), store, Recorder(store), lambda _event: None, on_cost=told.append)
    assert len(told) == 1


def test_every_training_is_a_round_of_runs_and_leaves_those_without_it_as_they_were() -> None:
    plain = comparison("dense", "flap", "adapt-accel", seeds=(0, 1))
    lora, full = (TrainingSpec(tokens=100, mode=mode) for mode in ("lora", "full"))
    tracks = expand(plain.model_copy(update={"recoveries": (None, lora, full)}))
    runs = [(s.method, s.seed, s.recovery.mode if s.recovery else None) for track in tracks for s in track[:1]]
    assert runs == [
        ("dense", 0, None),
        ("flap", 0, None),
        ("flap", 1, None),
        ("flap", 0, "lora"),
        ("flap", 1, "lora"),
        ("flap", 0, "full"),
        ("flap", 1, "full"),
        ("adapt-accel", 0, "full"),
        ("adapt-accel", 1, "full"),
    ]
    trained = [s for track in tracks for s in track if s.recovery]
    assert all(s.recovery.seed == s.seed for s in trained if s.recovery)
    assert [s.run_id for track in expand(plain) for s in track] == [
        s.run_id for track in tracks for s in track if s.recovery is None
    ]
