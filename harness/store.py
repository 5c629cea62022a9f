"""Results on disk: where a run lies, writing it whole or not at all, reading it back, telling which specs are missing.

Layout under the root::

    runs/<run_id>/         the files of a run (`harness.run_files`)
    leases/<name>.lease    renewed while a process works on what it names (`harness.leases`)

A run's folder is filled under a hidden name and renamed, so that at any moment it is absent or whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd

from harness.durable import disk_errors, remove, sync_folder, write_synced
from harness.errors import UserError
from harness.garbage import collection_paused
from harness.leases import Leases
from harness.records import RunRecord, RunSpec, RunSummary
from harness.run_files import RECORD, Record, encode, read_all, read_documents, read_record

LEFTOVER_SECONDS = 24 * 3600.0
"""Age from which a hidden folder cannot belong to a process that still writes it."""


_HIDDEN = ("new", "old", "probe")
_READS = 5
"""Times that a run is read if it is replaced in between."""
Version = tuple[int, int, int]
Content = TypeVar("Content")


def _version(folder: Path) -> Version | None:
    try:
        stat = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


class Store:
    """The runs of one results folder; any number of processes may share it.

    Args:
        root: the results folder. Nothing is created before the first write, so that reading needs no permission.
        shown: what messages call it; None takes its path.
    """

    def __init__(self, root: Path, shown: str | None = None) -> None:
        self.root = Path(root)
        self.shown = shown or str(root)
        self.runs = self.root / "runs"
        self._leases = Leases(self.root / "leases")

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
            for leftover in (path for kind in _HIDDEN for path in self.runs.glob(f".{kind}-*")):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                        remove(leftover)

    def missing(self, specs: Iterable[RunSpec]) -> list[RunSpec]:
        """The specs still to run, in the order given: those without a record, and those whose run ``failed``.

        Raises:
            UserError: a record that is there cannot be read.
        """
        return [spec for spec in specs if not self.is_done(spec.run_id)]

    def is_done(self, run_id: str) -> bool:
        """Whether the run is here and did not ``fail``.

        Raises:
            UserError: its record cannot be read.
        """
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

    @collection_paused()
    def summaries(
        self, run_ids: Iterable[str] | None = None, is_wanted: Callable[[str], bool] | None = None
    ) -> list[RunSummary]:
        """Records without what tells of a run's way (trace, layers, traceback), so that many fit into memory.

        Args:
            run_ids: of the runs wanted, in this order; None takes all, sorted.
            is_wanted: which measures stay, by their names; None keeps all.

        Raises:
            UserError: a record is missing, corrupt or of an unknown format version.
        """
        wanted = self.run_ids() if run_ids is None else run_ids
        found = (self._read(run_id, RunSummary) for run_id in wanted)
        if is_wanted is None:
            return list(found)
        return [r.model_copy(update={"measures": tuple(m for m in r.measures if is_wanted(m.name))}) for r in found]

    def load(self, run_id: str) -> RunRecord:
        """The record of one run.

        Raises:
            UserError: there is no such run, its record is corrupt, or its format version is unknown.
        """
        return self._read(run_id, RunRecord)

    def _read(self, run_id: str, kind: type[Record]) -> Record:
        return self._steadily(run_id, lambda folder: read_record(folder, kind))

    def _steadily(self, run_id: str, read: Callable[[Path], Content]) -> Content:
        """Read a run's folder, and once more if another process replaced it meanwhile."""
        folder = self.folder(run_id)
        failure = UserError(f"no run {run_id!r} in {self.shown} (`harness report {self.shown}` lists all)")
        for _read in range(_READS):
            before = _version(folder)
            if before is None:  # or just between two versions
                time.sleep(0.01)
                continue
            try:
                return read(folder)
            except UserError as error:
                if _version(folder) == before:
                    raise
                failure = error
        raise failure

    def versions(self, run_ids: Iterable[str]) -> dict[str, Version | None]:
        """What changes whenever a run is written; None for one that is not there."""
        return {run_id: _version(self.folder(run_id)) for run_id in run_ids}

    def written_since(self, versions: Mapping[str, Version | None]) -> list[str]:
        """Ids of the runs that were written after their versions were taken."""
        return [run_id for run_id, now in self.versions(versions).items() if now not in (None, versions[run_id])]

    def documents(self, run_id: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        """Per-document scores of a run that is in the store, as `harness.run_files.read_documents` reads them."""
        return self._steadily(run_id, lambda folder: read_documents(folder, columns))

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
        self.put(record.spec.run_id, encode(record, documents))

    def adopt(self, other: Store, run_id: str) -> None:
        """Store a copy of another store's run, its files as they are, replacing what is here under that id.

        Raises:
            UserError: the other's run is corrupt, or this folder cannot be written to.
        """
        self.put(run_id, read_all(other.folder(run_id)))

    def put(self, run_id: str, files: dict[str, bytes]) -> None:
        """Store a run by its files, as `harness.run_files.encode` makes them; on return they are on the disk.

        Raises:
            UserError: the folder cannot be written to or the disk is full; nothing half-written stays.
        """
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

    def lease(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Keep other processes from the work of that name while the block runs, as `harness.leases` does it."""
        return self._leases.take(name)
