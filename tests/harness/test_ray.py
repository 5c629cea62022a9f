"""Tracks on a Ray cluster of two nodes on this machine: the table of one process, and a node killed on the way."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.compare import Comparison, compare
from harness.errors import UserError
from harness.executors import LocalExecutor
from harness.records import CalibrationSpec, EvaluationSpec, ModelRef
from harness.results import Results, results_at
from harness.store import Store
from harness.track import Event

pytestmark = pytest.mark.ray

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs no track, and two nodes with a core each: three raylets."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def asked(checkpoint: Path) -> Comparison:
    return Comparison(
        models=(ModelRef(name=str(checkpoint)),),
        methods=("dense", "flap", "magnitude", "random"),
        sparsities=(0.01, 0.02),
        calibration=CalibrationSpec(num_samples=4, num_tokens=32),
        evaluation=EvaluationSpec(tasks=("arc_easy", "winogrande"), limit=2, heldout_tokens=64, heldout_length=32),
    )


def numbers(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[[name for name in frame if not name.endswith(("_seconds", "_bytes"))]]


def ray_executor(address: str, results: Results | Path, **resources: Any) -> Any:
    from harness.ray_executor import RayExecutor, Resources

    return RayExecutor(address, Resources(**resources), results if isinstance(results, Results) else Results(results))


def test_a_cluster_makes_the_table_of_one_process_and_a_killed_node_loses_nothing(
    cluster: Any, checkpoint: Path, tmp_path: Path
) -> None:
    alone, together = Store(tmp_path / "alone"), Store(tmp_path / "together")
    expected = compare(asked(checkpoint), alone, LocalExecutor(), lambda _event: None)
    executor = ray_executor(cluster.address, together.root, num_cpus=1)
    assert executor.num_workers == 2
    victim, *_ = cluster.worker_nodes
    events: list[Event] = []
    killed = threading.Event()

    def hear(event: Event) -> None:
        events.append(event)
        if event.kind == "finished" and not killed.is_set():
            killed.set()
            cluster.remove_node(victim, allow_graceful=False)

    found = compare(asked(checkpoint), together, executor, hear)
    assert killed.is_set()
    assert {record.status for record in together.records()} == {"ok"}
    pd.testing.assert_frame_equal(numbers(found.frame), numbers(expected.frame))
    assert {event.run_id for event in events if event.kind == "finished"} == set(together.run_ids())


def test_nodes_that_share_no_folder_hand_their_runs_over_by_url(cluster: Any, checkpoint: Path, tmp_path: Path) -> None:
    url = (tmp_path / "bucket").as_uri()
    results = results_at(url, tmp_path / "mirror")
    found = compare(
        asked(checkpoint), results.store, ray_executor(cluster.address, results, num_cpus=1), lambda _event: None
    )
    fresh = results_at(url, tmp_path / "elsewhere")
    fresh.pull()
    assert fresh.store.run_ids() == results.store.run_ids()
    assert {record.status for record in fresh.store.records()} == {"ok"}
    assert list(found.frame["status"]) == ["reference"] + 7 * ["ok"]  # a line for chance, then the runs


def test_a_track_that_no_node_has_the_memory_for_is_a_sentence(cluster: Any, checkpoint: Path, tmp_path: Path) -> None:
    executor = ray_executor(cluster.address, tmp_path, num_cpus=1)
    executor.memory_of = lambda _track: 2**50
    with pytest.raises(UserError, match=r"no node of the Ray cluster has 1 CPU, 1048576\.0 GiB of memory for a track"):
        compare(asked(checkpoint), Store(tmp_path), executor, lambda _event: None)


def test_what_no_node_has_is_a_sentence(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no node of the Ray cluster has 64 CPU for a track"):
        ray_executor(cluster.address, tmp_path, num_cpus=64)


def test_a_users_mistake_comes_back_from_the_cluster(cluster: Any, checkpoint: Path, tmp_path: Path) -> None:
    wrong = asked(checkpoint).model_copy(
        update={"calibration": CalibrationSpec(source="nowhere.txt"), "methods": ("flap",)}
    )
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        compare(wrong, Store(tmp_path), ray_executor(cluster.address, tmp_path, num_cpus=1), lambda _event: None)


def test_an_address_without_a_cluster_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        ray_executor("127.0.0.1:1", tmp_path)


def test_the_command_line_runs_on_the_cluster(cluster: Any, checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "harness.cli", "compare", "--models", str(checkpoint), "--methods", "dense,magnitude",
            "--sparsities", "0.02", "--tasks", "arc_easy", "--limit", "2", "--heldout-tokens", "64", "--no-efficiency",
            "--executor", "ray", "--ray-address", cluster.address, "--out", str(tmp_path),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record.status for record in Store(tmp_path).records()] == ["ok", "ok"]
