"""A results folder by path, or by URL on object storage with a folder of this machine that mirrors it. No torch here.

A run's files go up before its sums, which readers look for first: a run is there whole or not at all. The storage is
the truth; what a mirror has and the storage lacks (the network was away, say) goes up with the next push.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from platformdirs import user_cache_path

from harness.errors import UserError
from harness.run_files import SUMS, listed_in, read_all
from harness.store import Store

_URL = re.compile(r"^[a-z][a-z0-9+.-]*://")


def results_at(where: str, mirror: Path | None = None) -> Results:
    """The results folder that a user names.

    Args:
        where: a path, or a URL that fsspec knows, such as ``s3://bucket/results``.
        mirror: folder for the mirror of a URL; None takes one in the user's cache.

    Raises:
        UserError: no driver for this kind of storage is installed, or it cannot be reached.
    """
    if not _URL.match(where):
        return Results(Path(where))
    name = hashlib.sha256(where.rstrip("/").encode()).hexdigest()[:16]
    return RemoteResults(where, mirror or user_cache_path("adapt-pruner-harness") / "mirrors" / name)


class Results:
    """A results folder of this machine, or one that it mounts."""

    url: str | None = None
    """Where the runs are besides."""

    def __init__(self, folder: Path, shown: str | None = None) -> None:
        self.store = Store(folder, shown)

    def require_writable(self) -> None:
        """Fail now rather than after the first run.

        Raises:
            UserError: nothing can be written there.
        """
        self.store.require_writable()

    def pull(self, run_ids: Iterable[str] | None = None) -> None:
        """Fetch runs that others made: those of some ids, or all."""

    def push(self, run_ids: Iterable[str] | None = None) -> None:
        """Hand over runs that were made here: those of some ids where they differ, or all that are not there at all."""

    def publish(self, folder: Path) -> None:
        """Hand over the tables in a folder below the results folder."""


class RemoteResults(Results):
    """A results folder on object storage."""

    def __init__(self, url: str, mirror: Path) -> None:
        self.url = url.rstrip("/")
        super().__init__(mirror, self.url)
        with self._reaching():
            self._files, self._root = fsspec.core.url_to_fs(self.url)

    def require_writable(self) -> None:
        """Write to the mirror and to the storage, and remove it again."""
        super().require_writable()
        with self._reaching():
            self._put(".probe", b"x")
            self._files.rm_file(f"{self._root}/.probe")

    def pull(self, run_ids: Iterable[str] | None = None) -> None:
        """Fetch runs that the mirror lacks, or has otherwise: another machine may have made them anew.

        Raises:
            UserError: the storage cannot be reached, or holds a corrupt run.
        """
        with self._reaching():
            for run_id, sums in self._sums(self._there() if run_ids is None else list(run_ids)).items():
                here = self.store.folder(run_id) / SUMS
                if not here.exists() or here.read_bytes() != sums:
                    self._fetch(run_id, sums)

    def push(self, run_ids: Iterable[str] | None = None) -> None:
        """Upload runs of the mirror: those of some ids where the sums differ, or all whose sums the storage lacks.

        Raises:
            UserError: the storage cannot be reached; the runs stay in the mirror.
        """
        with self._reaching():
            here = set(self.store.run_ids())
            for run_id in here - set(self._there()) if run_ids is None else here & set(run_ids):
                files = read_all(self.store.folder(run_id))
                there = self._get(f"runs/{run_id}/{SUMS}")
                if there == files[SUMS]:
                    continue
                if there is not None:
                    self._files.rm_file(f"{self._root}/runs/{run_id}/{SUMS}")
                for name in sorted(files, key=lambda name: name == SUMS):
                    self._put(f"runs/{run_id}/{name}", files[name])

    def publish(self, folder: Path) -> None:
        """Upload a folder's files, below the name that it has below the mirror."""
        with self._reaching():
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                self._put(path.relative_to(self.store.root).as_posix(), path.read_bytes())

    def _fetch(self, run_id: str, sums: bytes) -> None:
        files = {SUMS: sums}
        for name, digest in listed_in(sums).items():
            data = self._get(f"runs/{run_id}/{name}")
            if data is None or hashlib.sha256(data).hexdigest() != digest:
                raise UserError(
                    f"{self.url}/runs/{run_id}/{name} is missing or does not match its {SUMS}; delete the run's files "
                    "there and run again"
                )
            files[name] = data
        self.store.put(run_id, files)

    def _there(self) -> list[str]:
        """Ids of the runs that are whole on the storage, sorted."""
        self._files.invalidate_cache()
        found = self._files.find(f"{self._root}/runs")
        return sorted(path.split("/")[-2] for path in found if path.endswith(f"/{SUMS}"))

    def _sums(self, run_ids: Sequence[str]) -> dict[str, bytes]:
        """Run id -> file of sums, of those that are whole on the storage; all asked for at once."""
        paths = {f"{self._root}/runs/{run_id}/{SUMS}": run_id for run_id in run_ids}
        found: dict[str, bytes | Exception] = self._files.cat(list(paths), on_error="return") if paths else {}
        sums = {}
        for path, data in found.items():
            if isinstance(data, bytes):
                sums[paths[path]] = data
            elif not isinstance(data, FileNotFoundError):
                raise data
        return sums

    def _get(self, name: str) -> bytes | None:
        try:
            data: bytes = self._files.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return data

    def _put(self, name: str, data: bytes) -> None:
        path = f"{self._root}/{name}"
        self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self._files.pipe_file(path, data)

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn whatever a storage's driver raises into one sentence."""
        try:
            yield
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"{self.url} needs a driver that is not installed: {error}") from error
        except Exception as error:  # every driver has exceptions of its own
            what: Any = str(error) or type(error).__name__
            raise UserError(
                f"cannot use the results folder {self.url}: {what}; check address, network and credentials, then run "
                f"the same command again (runs are kept in {self.store.root})"
            ) from error
