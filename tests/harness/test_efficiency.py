"""Wall time and peak memory."""

from __future__ import annotations

import time

import torch

from harness.efficiency import measured


def test_peak_counts_what_was_freed_before_the_end() -> None:
    with measured() as idle:
        pass
    with measured() as busy:
        block = torch.ones(64 * 2**20 // 4)
        del block
    assert busy.peak_bytes - idle.peak_bytes > 48 * 2**20


def test_an_earlier_peak_is_forgotten() -> None:
    with measured() as busy:
        block = torch.ones(128 * 2**20 // 4)
        del block
    with measured() as idle:
        pass
    assert idle.peak_bytes < busy.peak_bytes


def test_seconds_are_those_of_the_block() -> None:
    with measured() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 5
