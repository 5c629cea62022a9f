"""What running the models costs, as columns of the leaderboard and a note."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from harness.records import RunRecord
from harness.report.rows import REFERENCE_METHOD, Row

COLUMNS = {
    "macs_per_token": "efficiency/macs_per_token",
    "weight_bytes": "efficiency/weight_bytes",
    "inference_peak_bytes": "efficiency/peak_bytes",
    "first_token_seconds": "efficiency/first_token_seconds",
    "prefill_tokens_per_second": "efficiency/prefill_tokens_per_second",
    "prefill_vs_dense": "efficiency/prefill_tokens_per_second_vs_dense",
    "decode_tokens_per_second": "efficiency/decode_tokens_per_second",
    "decode_vs_dense": "efficiency/decode_tokens_per_second_vs_dense",
}
"""Column of the CSV file -> measure; empty where a run did not take it."""

_MIB = 1 << 20


def efficiency_line(records: Sequence[RunRecord]) -> dict[str, float | None]:
    """The columns of one row, means over its seeds."""
    line: dict[str, float | None] = {}
    for column, name in COLUMNS.items():
        found = [measure.value for record in records if (measure := record.measure(name))]
        line[column] = fmean(found) if found else None
    return line


def efficiency_cells() -> list[tuple[str, Callable[[Any], str]]]:
    """Headings for people, and what writes the cell of a line of the CSV file."""
    return [
        ("MMACs/token", lambda line: _in(line["macs_per_token"], 1e6, 1)),
        ("weights MiB", lambda line: _in(line["weight_bytes"], _MIB, 1)),
        ("peak MiB", lambda line: _in(line["inference_peak_bytes"], _MIB, 1)),
        ("first token ms", lambda line: _in(line["first_token_seconds"], 1e-3, 1)),
        ("prefill tokens/s (x dense)", lambda line: _speed(line, "prefill")),
        ("decode tokens/s (x dense)", lambda line: _speed(line, "decode")),
    ]


def efficiency_notes(rows: Iterable[Row]) -> list[str]:
    """How it was measured; nothing where it was not."""
    taken = [row.spec.efficiency for row in rows if any(r.measure(COLUMNS["macs_per_token"]) for r in row.records)]
    return [
        f"Efficiency at batch {spec.batch_size}: {spec.prompt_tokens} prompt tokens, then {spec.new_tokens} more after "
        f"the first new one, with a key-value cache. Times are medians over {spec.repeats} turns, the model and "
        f"{REFERENCE_METHOD} in turn in one process; x dense is the median over the turns of the speed over "
        f"{REFERENCE_METHOD}'s, so {REFERENCE_METHOD}'s own shows the noise. MACs are those of a forward pass over the "
        "prompt, head and attention included, by its tokens. The peak is weights, activations and cache alive at once. "
        "Times are this machine's: kernels decide whether fewer MACs are faster."
        for spec in dict.fromkeys(spec for spec in taken if spec is not None)
    ]


def _speed(line: Any, phase: str) -> str:
    speed, ratio = line[f"{phase}_tokens_per_second"], line[f"{phase}_vs_dense"]
    return "–" if pd.isna(speed) else f"{speed:,.1f} ({ratio:.2f})"


def _in(value: Any, unit: float, digits: int) -> str:
    return "–" if pd.isna(value) else f"{value / unit:,.{digits}f}"
