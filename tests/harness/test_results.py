"""Results folders by URL: mirrored here, whole there."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from harness.errors import UserError
from harness.records import RunRecord
from harness.results import RemoteResults, Results, results_at
from harness.run_files import DOCUMENTS, RECORD, SUMS
from harness.store import Store

Put = Callable[..., RunRecord]


@pytest.fixture
def url() -> str:
    """An empty bucket of this process's memory."""
    return f"memory://{uuid.uuid4().hex}/results"


def test_a_path_is_a_folder_and_nothing_goes_elsewhere(tmp_path: Path, put: Put) -> None:
    results = results_at(str(tmp_path))
    assert type(results) is Results
    record = put(results.store, "flap", 0.5)
    results.push([record.spec.run_id])
    results.pull()
    assert results.store.shown == str(tmp_path)


def test_what_one_machine_pushes_another_pulls(url: str, tmp_path: Path, put: Put) -> None:
    here, there = results_at(url, tmp_path / "here"), results_at(f"{url}/", tmp_path / "there")
    here.require_writable()
    record = put(here.store, "flap", 0.5)
    here.push(here.store.run_ids())
    there.pull()
    run_id = record.spec.run_id
    assert there.store.load(run_id) == record
    for name in (RECORD, DOCUMENTS, SUMS):
        assert (there.store.folder(run_id) / name).read_bytes() == (here.store.folder(run_id) / name).read_bytes()


def test_a_run_without_its_sums_is_not_there_yet(url: str, tmp_path: Path, put: Put) -> None:
    here, there = results_at(url, tmp_path / "here"), results_at(url, tmp_path / "there")
    record = put(here.store, "flap", 0.5)
    here.push([record.spec.run_id])
    files, root = fsspec.core.url_to_fs(url)
    files.rm_file(f"{root}/runs/{record.spec.run_id}/{SUMS}")
    there.pull()
    assert there.store.run_ids() == []
    here.push()  # an upload that was cut off goes on
    there.pull()
    assert there.store.run_ids() == [record.spec.run_id]


def test_a_failed_run_gives_way_to_one_that_another_made(url: str, tmp_path: Path, put: Put) -> None:
    here, there = results_at(url, tmp_path / "here"), results_at(url, tmp_path / "there")
    record = put(there.store, "flap", 0.5)
    there.push([record.spec.run_id])
    here.store.write(RunRecord(spec=record.spec, status="failed", reason="the power went"))
    here.pull()
    assert here.store.load(record.spec.run_id) == record


def test_a_run_made_again_replaces_what_is_there(url: str, tmp_path: Path, put: Put) -> None:
    here, there = results_at(url, tmp_path / "here"), results_at(url, tmp_path / "there")
    put(here.store, "flap", 0.3)
    here.push(here.store.run_ids())
    record = put(here.store, "flap", 0.6)
    here.push(here.store.run_ids())
    there.pull()
    assert there.store.load(record.spec.run_id) == record


def test_a_run_that_another_made_again_replaces_the_mirrors(url: str, tmp_path: Path, put: Put) -> None:
    here, there = results_at(url, tmp_path / "here"), results_at(url, tmp_path / "there")
    old = put(here.store, "flap", 0.3)
    here.push([old.spec.run_id])
    there.pull()
    new = put(there.store, "flap", 0.6)
    there.push([new.spec.run_id])
    here.pull()
    assert here.store.load(old.spec.run_id) == new != old
    here.push([old.spec.run_id])
    assert here.store.load(old.spec.run_id) == new


def test_tables_are_published_below_the_folder(url: str, tmp_path: Path) -> None:
    results = results_at(url, tmp_path)
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "leaderboard.csv").write_text("model\n")
    results.publish(tmp_path / "latest")
    with fsspec.open(f"{url}/latest/leaderboard.csv", "rt") as file:
        assert file.read() == "model\n"


def test_a_corrupt_download_is_one_sentence(url: str, tmp_path: Path, put: Put) -> None:
    here, there = results_at(url, tmp_path / "here"), results_at(url, tmp_path / "there")
    record = put(here.store, "flap", 0.5)
    here.push([record.spec.run_id])
    with fsspec.open(f"{url}/runs/{record.spec.run_id}/{RECORD}", "wb") as file:
        file.write(b"{}")
    with pytest.raises(UserError, match="is missing or does not match its SHA256SUMS"):
        there.pull()
    assert there.store.run_ids() == []


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nosuch://bucket/results", "Protocol not known: nosuch"),
        ("http://127.0.0.1:1/results", "check address, network and credentials"),
    ],
)
def test_storage_that_cannot_be_used_is_one_sentence(where: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        results_at(where, tmp_path).require_writable()


def test_report_reads_a_url_and_puts_its_tables_there(
    tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Store(tmp_path / "made")
    record = put(made, "flap", 0.5)
    url = (tmp_path / "bucket").as_uri()
    remote = results_at(url, made.root)
    assert isinstance(remote, RemoteResults)
    remote.push([record.spec.run_id])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    subprocess.run([sys.executable, "-m", "harness.cli", "report", url], check=True, capture_output=True)
    assert "flap" in (tmp_path / "bucket" / "latest" / "leaderboard.md").read_text()
