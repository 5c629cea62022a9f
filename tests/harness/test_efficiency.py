"""Wall time and peak memory."""

from __future__ import annotations

import mmap
import time

from harness.efficiency import measured

MIB = 2**20


def touch(num_bytes: int) -> None:
    """Hold fresh memory for a moment: pages of its own, which no earlier test left behind in the heap."""
    with mmap.mmap(-1, num_bytes) as block:
        for start in range(0, num_bytes, 4096):
            block[start] = 1


def test_peak_counts_what_was_freed_before_the_end() -> None:
    with measured() as idle:
        pass
    with measured() as busy:
        touch(64 * MIB)
    assert busy.peak_bytes - idle.peak_bytes > 48 * MIB


def test_an_earlier_peak_is_forgotten() -> None:
    with measured() as busy:
        touch(128 * MIB)
    with measured() as idle:
        pass
    assert busy.peak_bytes - idle.peak_bytes > 96 * MIB


def test_seconds_are_those_of_the_block() -> None:
    with measured() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 5
