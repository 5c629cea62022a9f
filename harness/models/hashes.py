"""Hashes of weight files: naming a checkpoint, and noticing that it was damaged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from harness.errors import UserError
from harness.models.checkpoint import weight_files

SUMS = "SHA256SUMS"
"""Beside the weights of a folder that this package saved, in the format of ``sha256sum --check``."""

_SUM = re.compile(r"^([0-9a-f]{64})  (\S+)$", re.MULTILINE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def weights_sha256(folder: Path) -> str:
    """Hash over the hashes of a checkpoint's weight files, in the order of their names, each checked where it is known.

    Raises:
        UserError: a file's hash is not the one noted in ``SHA256SUMS`` or given by the hub.
    """
    digests = {path.name: file_sha256(path) for path in weight_files(folder)}
    for name, known in _known(folder).items():
        if digests.get(name, known) != known:
            raise UserError(
                f"{folder / name} has SHA-256 {digests[name][:12]}..., not {known[:12]}... as noted: it is damaged or "
                f"was changed; get it again, or delete {SUMS} there if the change was meant"
            )
    return hashlib.sha256("".join(digests.values()).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of a file; a note beside it (``model.sha256.json``: size, mtime in ns, hash) spares reading it."""
    stat = path.stat()
    note = path.with_suffix(".sha256.json")
    if note.is_file():
        size, mtime, known = json.loads(note.read_text())
        if (size, mtime) == (stat.st_size, stat.st_mtime_ns):
            return str(known)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Note the hash of every weight file in ``SHA256SUMS``."""
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in weight_files(folder)]
    (folder / SUMS).write_text("".join(lines))


def _known(folder: Path) -> Mapping[str, str]:
    """File name -> the hash it should have, where something says so."""
    if (folder / SUMS).is_file():
        return {name: digest for digest, name in _SUM.findall((folder / SUMS).read_text())}
    # The hub cache keeps big files under their SHA-256 and links to them.
    blobs = {path.name: path.resolve().name for path in weight_files(folder) if path.is_symlink()}
    return {name: blob for name, blob in blobs.items() if _SHA256.fullmatch(blob)}
