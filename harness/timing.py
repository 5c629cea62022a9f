"""How long something takes at its fastest."""

from __future__ import annotations

import time
from collections.abc import Callable


def fastest(run: Callable[[], object], repeats: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of some runs, after one that warms up.

    Args:
        run: returns when its work is done; on a GPU it must wait for it.
        repeats: runs that count.
        clock: tells seconds.
    """
    run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)
