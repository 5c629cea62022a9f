"""Who works on what, told by files: for processes of one machine or of several that share a folder."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from harness.durable import disk_errors

LEASE_SECONDS = 120.0
"""Without a sign of life from another machine for this long, a lease is free to take."""


class Leases:
    """The leases of one folder, as one process sees them.

    Args:
        folder: of the lease files; created with the first lease.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # One object a name: it remembers since when it has seen another's lease unrenewed.
        self._leases: dict[str, SoftFileLease] = {}

    @contextlib.contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Keep other processes from the same work while the block runs; yields whether the lease is held.

        A lease is a file that its holder renews. What a dead process of this machine held is free at once, what one of
        another machine held after `LEASE_SECONDS` without renewal, counted on the waiting machine's own monotonic
        clock: clocks that jump or disagree change nothing. A holder that was suspended for longer may find its work
        done by another; as runs appear whole and repeat, that costs time only.

        Args:
            name: of the work, such as a track.

        Raises:
            UserError: the folder cannot be written to.
        """
        readable, digest = re.sub(r"[^\w.-]+", "-", name)[:80], hashlib.sha256(name.encode()).hexdigest()[:8]
        path = self.folder / f"{readable}-{digest}.lease"
        with disk_errors(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            lease = self._leases.setdefault(name, SoftFileLease(path, lease_duration=LEASE_SECONDS))
            try:
                lease.acquire(timeout=0)
                held = True
            except Timeout:
                held = False
        try:
            yield held
        finally:
            if held:
                lease.release()
