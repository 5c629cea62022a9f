"""Runs on disk: whole or absent, checked when read, one clear sentence when something is wrong."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from harness.durable import write_file
from harness.errors import UserError
from harness.records import LayerWidths, ModelRef, RunRecord, RunSpec
from harness.run_files import DOCUMENTS, RECORD, SUMS
from harness.store import Store

Make = Callable[..., RunRecord]


@pytest.fixture
def stored(add_run: Make) -> RunRecord:
    """One run in the store."""
    return add_run("flap", 0.2)


def test_a_record_and_its_documents_come_back_as_they_were(
    store: Store, make_spec: Callable[..., RunSpec], make_documents: Callable[..., pd.DataFrame], make_record: Make
) -> None:
    spec = make_spec()
    documents = make_documents(spec)
    record = make_record(spec, documents, knob={"slicing_ratio": 0.1 + 0.2}, trace={"layers": [[1.5, None], "x"]})
    store.write(record, documents)
    assert store.load(spec.run_id) == record
    read = store.documents(spec.run_id)
    assert read is not None
    assert list(read.columns) == list(documents.columns)
    assert read["loglikelihoods"].map(list).tolist() == documents["loglikelihoods"].tolist()
    assert read["group"].isna().sum() == 350
    assert read["acc_norm"].isna().tolist() == documents["acc_norm"].isna().tolist()


def test_a_trace_that_json_cannot_hold_is_refused_when_the_record_is_made(make_spec: Callable[..., RunSpec]) -> None:
    with pytest.raises(ValidationError, match="trace"):
        RunRecord(spec=make_spec(), status="ok", trace={"widths": {1, 2}})


def test_only_the_columns_asked_for_are_read(store: Store, stored: RunRecord) -> None:
    read = store.documents(stored.spec.run_id, ["task", "acc"])
    assert read is not None
    assert list(read.columns) == ["task", "acc"]


def test_a_run_without_documents_has_none(store: Store, make_spec: Callable[..., RunSpec]) -> None:
    record = RunRecord(spec=make_spec(), status="unsupported", reason="no such layers")
    store.write(record)
    assert store.documents(record.spec.run_id) is None


def test_documents_without_a_column_are_refused(
    store: Store, make_spec: Callable[..., RunSpec], make_documents: Callable[..., pd.DataFrame], make_record: Make
) -> None:
    spec = make_spec()
    with pytest.raises(ValueError, match="doc_hash"):
        store.write(make_record(spec), make_documents(spec).drop(columns="doc_hash"))
    assert store.run_ids() == []


def test_sums_can_be_checked_by_hand(store: Store, stored: RunRecord) -> None:
    checked = subprocess.run(["sha256sum", "--check", SUMS], cwd=store.folder(stored.spec.run_id), check=False)
    assert checked.returncode == 0


def test_failed_runs_and_absent_ones_are_missing_and_the_rest_are_done(
    store: Store, make_spec: Callable[..., RunSpec]
) -> None:
    ok, unsupported, failed, absent = specs = [make_spec(m) for m in ("flap", "slicegpt", "random", "magnitude")]
    for spec, status in ((ok, "ok"), (unsupported, "unsupported"), (failed, "failed")):
        store.write(RunRecord(spec=spec, status=status))
    assert store.missing(specs) == [failed, absent]


def test_every_spec_is_missing_from_a_folder_that_does_not_exist(
    store: Store, make_spec: Callable[..., RunSpec]
) -> None:
    spec = make_spec()
    assert store.missing([spec]) == [spec]
    assert list(store.records()) == []
    assert not store.root.exists()


def test_a_later_attempt_replaces_the_earlier_one_whole(
    store: Store, stored: RunRecord, make_documents: Callable[..., pd.DataFrame]
) -> None:
    failed = RunRecord(spec=stored.spec, status="failed", reason="killed")
    store.write(failed)
    assert store.load(stored.spec.run_id) == failed
    assert store.documents(stored.spec.run_id) is None
    assert [p.name for p in store.runs.iterdir()] == [stored.spec.run_id]


def test_summaries_leave_out_what_tells_of_a_runs_way_and_keep_its_numbers(store: Store, add_run: Make) -> None:
    first, second = add_run("flap", 0.2), add_run("slicegpt", 0.2)
    widths = LayerWidths(num_key_value_heads=1, intermediate_size=8)
    way = {"trace": {"steps": [1, 2, 3]}, "traceback": "...", "layers": (widths,)}
    store.write(first.model_copy(update=way))
    wanted = [second.spec.run_id, first.spec.run_id]
    found = store.summaries(wanted)
    assert [record.spec.run_id for record in found] == wanted
    assert [record.measures for record in found] == [second.measures, first.measures]
    assert [(record.trace, record.traceback, record.layers) for record in found] == [({}, None, ())] * 2
    assert gc.isenabled()


def test_a_changed_copy_of_a_spec_has_an_id_of_its_own(make_spec: Callable[..., RunSpec]) -> None:
    spec = make_spec()
    before = spec.run_id
    assert spec.model_copy(update={"seed": 7}).run_id == make_spec(seed=7).run_id != before
    assert spec == make_spec()  # whose id was never asked for
    assert "run_id" not in spec.model_dump()


def test_a_model_folder_with_a_hidden_name_has_runs_that_are_seen(
    store: Store, make_spec: Callable[..., RunSpec]
) -> None:
    spec = make_spec(model=ModelRef(name="/scratch/.my-model"))
    store.write(RunRecord(spec=spec, status="ok"))
    assert store.run_ids() == [spec.run_id]
    assert spec.run_id.startswith("my-model--")


def test_a_run_that_is_replaced_while_it_is_read_is_read_whole(store: Store, stored: RunRecord) -> None:
    versions = [stored, stored.model_copy(update={"notes": ("made again",)})]
    done = threading.Event()

    def replace() -> None:
        for i in range(60):
            store.write(versions[i % 2])
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    while not done.is_set():
        assert store.load(stored.spec.run_id) in versions
    writer.join()


def test_sums_cannot_name_a_file_elsewhere(store: Store, stored: RunRecord, tmp_path: Path) -> None:
    folder = store.folder(stored.spec.run_id)
    (tmp_path / "elsewhere").write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    with (folder / SUMS).open("a") as file:
        file.write(f"{digest}  {os.path.relpath(tmp_path / 'elsewhere', folder)}\n")
    with pytest.raises(UserError, match="does not list what the folder holds"):
        Store(tmp_path / "copy").adopt(store, stored.spec.run_id)


def test_records_come_sorted_by_run_id(store: Store, add_run: Make) -> None:
    for method in ("slicegpt", "flap", "random"):
        add_run(method, 0.2)
    found = [record.spec.run_id for record in store.records()]
    assert found == sorted(found)
    assert len(found) == 3


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from([RECORD, DOCUMENTS, SUMS]), where=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_any_damage_is_noticed_and_named(add_run: Make, store: Store, name: str, where: float, cut: bool) -> None:
    run_id = add_run("flap", 0.2).spec.run_id
    path = store.folder(run_id) / name
    data = bytearray(path.read_bytes())
    position = int(where * len(data))
    path.write_bytes(data[:position] if cut else data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])

    def read() -> None:
        store.load(run_id)
        store.documents(run_id)

    with pytest.raises(UserError, match="delete the folder") as error:
        read()
    assert str(store.folder(run_id)) in str(error.value)


@pytest.mark.parametrize("name", [RECORD, DOCUMENTS, SUMS])
def test_a_deleted_file_is_noticed(store: Store, stored: RunRecord, name: str) -> None:
    (store.folder(stored.spec.run_id) / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing; delete the folder"):
        store.documents(stored.spec.run_id) if name == DOCUMENTS else store.load(stored.spec.run_id)


def _rewrite(store: Store, run_id: str, content: str) -> None:
    """Replace a record behind the store's back, sums included."""
    data = content.encode()
    (store.folder(run_id) / RECORD).write_bytes(data)
    sums = (store.folder(run_id) / SUMS).read_text().splitlines()
    sums[0] = f"{hashlib.sha256(data).hexdigest()}  {RECORD}"
    (store.folder(run_id) / SUMS).write_text("\n".join([*sums, ""]))


def test_a_newer_format_is_refused_in_a_sentence(store: Store, stored: RunRecord) -> None:
    run_id = stored.spec.run_id
    newer = json.loads(stored.model_dump_json()) | {"format_version": 2, "new_field": 1}
    _rewrite(store, run_id, json.dumps(newer))
    with pytest.raises(UserError, match="has format version 2, this harness reads version 1"):
        store.load(run_id)


@pytest.mark.parametrize(("field", "value"), [("status", "fine"), ("trace", [1, 2]), ("measures", [{"name": "a"}])])
def test_a_record_that_does_not_fit_the_format_names_the_field(
    field: str, value: object, store: Store, stored: RunRecord
) -> None:
    run_id = stored.spec.run_id
    _rewrite(store, run_id, json.dumps(json.loads(stored.model_dump_json()) | {field: value}))
    with pytest.raises(UserError, match=f"not a valid record: {field}"):
        store.load(run_id)


def test_a_renamed_folder_is_noticed(store: Store, stored: RunRecord) -> None:
    store.folder(stored.spec.run_id).rename(store.runs / "other")
    with pytest.raises(UserError, match="is the record of run"):
        list(store.records())


def test_an_unknown_run_is_a_sentence(store: Store, stored: RunRecord) -> None:
    with pytest.raises(UserError, match="no run 'flap-1'"):
        store.load("flap-1")


def test_an_unwritable_folder_is_a_sentence(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "results")
    for attempt in (store.require_writable, lambda: store.write(RunRecord(spec=make_spec(), status="failed"))):
        with pytest.raises(UserError, match=r"cannot write to the folder .*file/results"):
            attempt()
    with pytest.raises(UserError, match="cannot write"), store.lease("x"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_sentence_and_can_still_be_read(store: Store, stored: RunRecord) -> None:
    store.runs.chmod(0o555)
    try:
        with pytest.raises(UserError, match="Permission denied; check its permissions"):
            store.write(stored)
        assert list(store.records()) == [stored]
    finally:
        store.runs.chmod(0o755)


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(store: Store, stored: RunRecord) -> None:
    # A limit on file size stands for a disk that fills up in the middle of a file.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="free some space"):
            store.write(stored)
        with pytest.raises(UserError, match="free some space"):
            write_file(store.root / "table.md", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert store.load(stored.spec.run_id) == stored
    assert store.documents(stored.spec.run_id) is not None
    assert [p.name for p in store.root.rglob(".*")] == []


def test_old_leftovers_are_swept_and_young_ones_kept(store: Store, stored: RunRecord) -> None:
    old, young = store.runs / ".new-a-1", store.runs / ".new-b-2"
    for folder in (old, young):
        folder.mkdir()
        (folder / RECORD).write_text("{")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert store.run_ids() == [stored.spec.run_id]
    store.require_writable()
    assert sorted(p.name for p in store.runs.iterdir()) == [".new-b-2", stored.spec.run_id]


def test_write_file_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    for content in (b"first", b"second"):
        write_file(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


_WRITER = """
import itertools, sys
from pathlib import Path
import pandas as pd
from harness.records import RunRecord
from harness.store import Store
store, template = Store(Path(sys.argv[1])), RunRecord.model_validate_json(Path(sys.argv[2]).read_text())
documents = pd.read_parquet(sys.argv[3])
print("ready", flush=True)
for i in itertools.count():
    spec = template.spec.model_copy(update={"seed": i % 20})
    store.write(template.model_copy(update={"spec": spec}), documents)
"""


def test_kill_9_at_any_moment_leaves_every_record_absent_or_whole(
    store: Store, stored: RunRecord, tmp_path: Path
) -> None:
    template = store.folder(stored.spec.run_id)
    other = Store(tmp_path / "killed")
    arguments = [sys.executable, "-c", _WRITER, str(other.root), str(template / RECORD), str(template / DOCUMENTS)]
    whole = 0
    for moment in (0.01, 0.06, 0.2):
        # Two writers of the same runs, so that they also get into each other's way.
        writers = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(2)]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(moment)
        for writer in writers:
            assert writer.poll() is None, "the writer stopped by itself"
            writer.kill()
            writer.wait()
        for record in other.records():
            documents = other.documents(record.spec.run_id)
            assert documents is not None
            assert len(documents) == 362
            whole += 1
    assert whole > 0
