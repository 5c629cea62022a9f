"""What a piece of work costs this process: wall time and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Cost:
    """Filled in when the measured block ends."""

    seconds: float = 0.0
    peak_bytes: int = 0
    """Most memory the process held while the block ran: resident on the CPU, allocated on a CUDA device."""


@contextmanager
def measured(device: str = "cpu") -> Iterator[Cost]:
    """Measure the block's wall time and the process's peak memory while it runs."""
    cost = Cost()
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_peak()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - start
        cost.peak_bytes = torch.cuda.max_memory_allocated(device) if cuda else _peak_bytes()


def _reset_peak() -> None:
    # Linux forgets the high-water mark on request; elsewhere the peak is that of the process since it began.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
