"""Results on disk: where a run lies, writing it whole or not at all, reading it back, telling which specs are missing.

Layout under the root::

    runs/<run_id>/record.json        the RunRecord, nothing else
    runs/<run_id>/documents.parquet  one row per scored document; absent where nothing was scored
    runs/<run_id>/SHA256SUMS         of the other two, in the format of ``sha256sum --check``
    locks/<name>.lock                held while a process works on what it names

A run's folder is filled under a hidden name and renamed, so that at any moment it is absent or whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pydantic import ValidationError

from harness.durable import disk_errors, remove, sync_folder, write_synced
from harness.errors import UserError
from harness.records import FORMAT_VERSION, RunRecord, RunSpec

RECORD = "record.json"
DOCUMENTS = "documents.parquet"
SUMS = "SHA256SUMS"

DOCUMENT_TYPES: dict[str, pa.DataType | None] = {
    "task": pa.string(),
    "group": pa.string(),
    "doc_id": pa.int64(),
    "doc_hash": pa.string(),
    "target": None,
    "loglikelihoods": pa.list_(pa.float64()),
    "greedy": pa.list_(pa.bool_()),
    "acc": pa.float64(),
    "acc_norm": pa.float64(),
    "margin": pa.float64(),
    "chance": pa.float64(),
}
"""Columns of ``documents.parquet``; None where the type follows the data (an index, or a text)."""

_SUM = re.compile(r"^([0-9a-f]{64})  (\S+)$", re.MULTILINE)

LEFTOVER_SECONDS = 24 * 3600.0
"""Age from which a hidden folder cannot belong to a process that still writes it."""


class Store:
    """The runs of one results folder; any number of processes may share it.

    Args:
        root: the results folder. Nothing is created before the first write, so that reading needs no permission.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.runs = self.root / "runs"

    def folder(self, run_id: str) -> Path:
        """Where the run lies, or would lie."""
        return self.runs / run_id

    def require_writable(self) -> None:
        """Fail now rather than after the first run, and sweep what killed processes left behind.

        Raises:
            UserError: the folder cannot be created or written to.
        """
        with disk_errors(self.root):
            self.runs.mkdir(parents=True, exist_ok=True)
            probe = self.runs / f".probe-{uuid.uuid4().hex}"
            write_synced(probe, b"x")
            probe.unlink()
            for leftover in self.runs.glob(".*"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                        remove(leftover)

    def missing(self, specs: Iterable[RunSpec]) -> list[RunSpec]:
        """The specs still to run, in the order given: those without a record, and those whose run ``failed``.

        Raises:
            UserError: a record that is there cannot be read.
        """
        return [spec for spec in specs if not self._is_done(spec.run_id)]

    def _is_done(self, run_id: str) -> bool:
        return (self.folder(run_id) / RECORD).exists() and self.load(run_id).status != "failed"

    def run_ids(self) -> list[str]:
        """Every run in the folder, sorted; empty where the folder does not exist."""
        try:
            with os.scandir(self.runs) as entries:
                return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read the results folder {self.root}: {error.strerror}") from error

    def records(self) -> Iterator[RunRecord]:
        """Every record, sorted by run id, each read and checked when its turn comes.

        Raises:
            UserError: on reaching a record that is corrupt or of an unknown format version.
        """
        return (self.load(run_id) for run_id in self.run_ids())

    def load(self, run_id: str) -> RunRecord:
        """The record of one run.

        Raises:
            UserError: there is no such run, its record is corrupt, or its format version is unknown.
        """
        folder = self.folder(run_id)
        if not folder.is_dir():
            raise UserError(f"no run {run_id!r} in {self.root} (`harness report {self.root}` lists all)")
        data = _read_checked(folder, RECORD, _read_sums(folder))
        record = _parse_record(folder / RECORD, data)
        if record.spec.run_id != run_id:
            raise UserError(
                f"{folder / RECORD} is the record of run {record.spec.run_id!r}: the folder was renamed, or written by "
                f"a harness that names runs otherwise; move it out of {self.runs} and run again"
            )
        return record

    def documents(self, run_id: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        """Per-document scores of one run, or None where it stored none.

        Args:
            run_id: of a run that is in the store.
            columns: of `DOCUMENT_TYPES`, to read no more than these; None reads all. Those that the harness did not
                know yet when the run was made come back empty.

        Raises:
            UserError: the file is missing or corrupt.
        """
        folder = self.folder(run_id)
        sums = _read_sums(folder)
        if DOCUMENTS not in sums:
            return None
        data = _read_checked(folder, DOCUMENTS, sums)
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            known = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            frame: pd.DataFrame = file.read(columns=known).to_pandas()
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(folder / DOCUMENTS, "cannot be read as parquet") from error
        return frame if columns is None else frame.reindex(columns=list(columns))

    def write(self, record: RunRecord, documents: pd.DataFrame | None = None) -> None:
        """Store a run, replacing what an earlier attempt left; on return it is on the disk.

        A process killed at any moment leaves the run absent or whole. Killed while it replaces an earlier record, it
        may leave the run absent: it is then simply run again.

        Args:
            record: of the run.
            documents: one row per scored document with the columns of `DOCUMENT_TYPES`; further columns are kept.

        Raises:
            UserError: the folder cannot be written to or the disk is full; nothing half-written stays.
        """
        files = {RECORD: record.model_dump_json(indent=1).encode() + b"\n"}
        if documents is not None:
            files[DOCUMENTS] = _to_parquet(documents)
        files[SUMS] = "".join(f"{_sha256(data)}  {name}\n" for name, data in files.items()).encode()
        run_id = record.spec.run_id
        fresh = self.runs / f".new-{run_id}-{uuid.uuid4().hex[:8]}"
        with disk_errors(self.root):
            try:
                fresh.mkdir(parents=True)
                for name, data in files.items():
                    write_synced(fresh / name, data)
                self._publish(fresh, self.folder(run_id))
            except BaseException:
                remove(fresh)
                raise

    def _publish(self, fresh: Path, target: Path) -> None:
        """Rename ``fresh`` to ``target``; an older ``target`` steps aside first, as a folder cannot be overwritten."""
        retired = []
        while True:
            try:
                fresh.replace(target)
                break
            except OSError as error:
                # Another process may publish the same run in between, hence the loop.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            with contextlib.suppress(FileNotFoundError):
                retired.append(target.replace(self.runs / f".old-{target.name}-{uuid.uuid4().hex[:8]}"))
        for folder in retired:
            remove(folder)
        sync_folder(self.runs)

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Keep other processes from the same work while the block runs; yields whether the lock is held.

        A process that dies lets go of its locks.

        Args:
            name: of the work, such as a run id or a track.
            wait: until whoever holds the lock is done; otherwise yield False at once.

        Raises:
            UserError: the folder cannot be written to.
        """
        readable = re.sub(r"[^\w.-]+", "-", name)[:80]
        path = self.root / "locks" / f"{readable}-{_sha256(name.encode())[:8]}.lock"
        with disk_errors(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=-1 if wait else 0)
                held = True
            except Timeout:
                held = False
        try:
            yield held
        finally:
            if held:
                lock.release()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _corrupt(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}; delete the folder {path.parent} and run the same command again to redo this run")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _corrupt(path, "is missing") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, as written beside them."""
    path = folder / SUMS
    text = _read_bytes(path).decode(errors="replace")
    sums = {name: digest for digest, name in _SUM.findall(text)}
    whole = "".join(f"{digest}  {name}\n" for name, digest in sums.items()) == text
    # Without this, losing the line of a file would look like a run that never had it.
    listed = DOCUMENTS in sums or not (folder / DOCUMENTS).exists()
    if not (whole and listed and RECORD in sums):
        raise _corrupt(path, "is corrupt: it does not list what the folder holds")
    return sums


def _read_checked(folder: Path, name: str, sums: dict[str, str]) -> bytes:
    data = _read_bytes(folder / name)
    if _sha256(data) != sums[name]:
        raise _corrupt(folder / name, f"is corrupt: {len(data)} bytes that do not match {SUMS}")
    return data


def _parse_record(path: Path, data: bytes) -> RunRecord:
    try:
        return RunRecord.model_validate_json(data)
    except ValidationError as error:
        version = _format_version(data)
        if version is not None and version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this harness reads version {FORMAT_VERSION}: use the harness "
                "that wrote it, or run again into another folder"
            ) from error
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _corrupt(path, f"is not a valid record: {where}: {first['msg']}") from error


def _format_version(data: bytes) -> object:
    try:
        content = json.loads(data)
    except ValueError:
        return None
    return content.get("format_version") if isinstance(content, dict) else None


def _to_parquet(documents: pd.DataFrame) -> bytes:
    absent = [name for name in DOCUMENT_TYPES if name not in documents.columns]
    if absent:
        raise ValueError(f"per-document scores without the columns {absent}")
    columns = {
        str(name): pa.array(documents[name], type=DOCUMENT_TYPES.get(str(name)), from_pandas=True)
        for name in documents.columns
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()
