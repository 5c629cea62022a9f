"""Writing files so that they are there whole or not at all, and saying in one sentence what the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError


def write_file(path: Path, data: bytes) -> None:
    """Write a file, creating its folder: readers see the old content or the new, never a part.

    Raises:
        UserError: the folder cannot be written to or the disk is full; the old content stays.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write")
    fresh = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(fresh, data)
            fresh.replace(path)
        except BaseException:
            remove(fresh)
            raise


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a UserError that says which folder and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "check its permissions"
        raise UserError(
            f"cannot write to the folder {folder}: {error.strerror or error}; {remedy} or choose another folder, "
            "then run the same command again (finished runs are kept)"
        ) from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a file through to the disk: a full disk shows here, not after the rename that follows.

    Raises:
        OSError: as it comes; `disk_errors` words it.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a rename inside ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or folder if it is there and allows it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
