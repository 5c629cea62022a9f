"""The leaderboard as people read it: percent and millions, intervals beside averages; one layout for every medium."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from harness.report.efficiency import efficiency_cells
from harness.report.frame import CHANCE

TIED = "†"
NOTHING = "–"
_GIB = 1 << 30

Part = Literal["name", "scores", "likelihoods", "tasks", "size and cost", "knob", "efficiency"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of a table."""

    text: str
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table, heading and all."""

    heading: str
    cells: tuple[Cell, ...]
    part: Part
    """Which table it goes to where one is too wide; ``name`` columns go to all."""

    @property
    def is_empty(self) -> bool:
        """Whether no row has anything to say."""
        return all(cell.text in ("", NOTHING) for cell in self.cells)


def layout(frame: pd.DataFrame, tasks: Sequence[str], ppl_heading: str) -> list[Column]:
    """Columns for people; those without any entry are left out.

    Args:
        frame: as built by `harness.report.frame.build_frame`.
        tasks: with a column of their own.
        ppl_heading: names the convention of the perplexity per token.
    """
    spread = " ± sd over seeds" if frame["commonsense_spread"].notna().any() else ""
    written: list[tuple[str, Part, Callable[[Any], str]]] = [
        ("method", "name", _method),
        ("sparsity", "name", _target),
        ("removed", "size and cost", lambda line: percent(line["sparsity_total"], 2)),
        ("removed non-emb.", "size and cost", lambda line: percent(line["sparsity_non_embedding"], 2)),
        ("params M", "size and cost", lambda line: _number(line["params_total"], 1e6)),
        (f"average{spread} [95%]", "scores", _average),
        ("Δ dense [95%]", "scores", _delta),
        ("MMLU [95%]", "scores", lambda line: with_interval(line["mmlu"], line["mmlu_ci_low"], line["mmlu_ci_high"])),
        ("margin nats [95%]", "likelihoods", lambda line: _plain_interval(line, "margin")),
        (ppl_heading, "likelihoods", lambda line: _number(line["ppl_token"], 1, 2)),
        ("KL/token from dense [95%]", "likelihoods", lambda line: _plain_interval(line, "kl_dense", 3)),
        *((task, "tasks", _percent_of(task)) for task in tasks),
        ("prune s", "size and cost", lambda line: _number(line["prune_seconds"], 1)),
        ("prune peak GiB", "size and cost", lambda line: _number(line["prune_peak_bytes"], _GIB, 2)),
        ("train s", "size and cost", lambda line: _number(line["train_seconds"], 1)),
        ("train peak GiB", "size and cost", lambda line: _number(line["train_peak_bytes"], _GIB, 2)),
        ("eval s", "size and cost", lambda line: _number(line["eval_seconds"], 1)),
        ("knob", "knob", _knob),
        *((heading, "efficiency", write) for heading, write in efficiency_cells()),
    ]  # fmt: skip
    lines = frame.to_dict("records")
    columns = [_column(heading, part, write, lines) for heading, part, write in written]
    if frame["model"].nunique() > 1:
        columns.insert(0, _column("model", "name", lambda line: _text(line["model"]), lines))
    return [column for column in columns if not column.is_empty]


def percent(value: Any, digits: int = 1) -> str:
    """``0.4812`` as ``48.1``."""
    return NOTHING if pd.isna(value) else f"{100 * value:.{digits}f}"


def with_interval(value: Any, low: Any, high: Any) -> str:
    """``48.1 [45.0, 51.2]``."""
    if pd.isna(value):
        return NOTHING
    return percent(value) if pd.isna(low) else f"{percent(value)} [{percent(low)}, {percent(high)}]"


def signed_with_interval(value: Any, low: Any, high: Any) -> str:
    """``-3.2 [-5.0, -1.4]``."""
    return NOTHING if pd.isna(value) else f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _plain_interval(line: Any, name: str, digits: int = 2) -> str:
    """``0.123 [0.110, 0.136]``."""
    value, low, high = line[name], line[f"{name}_ci_low"], line[f"{name}_ci_high"]
    return NOTHING if pd.isna(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _column(heading: str, part: Part, write: Callable[[Any], str], lines: Sequence[Any]) -> Column:
    in_bold = heading == "method" or heading.startswith("average")
    cells = (Cell(write(line), bold=in_bold and line["best_or_tied"] == "best") for line in lines)
    return Column(heading, tuple(cells), part)


def _method(line: Any) -> str:
    return f"{line['method']} ({line['settings']})" if _text(line["settings"]) else str(line["method"])


def _target(line: Any) -> str:
    if line["method"] == CHANCE:
        return NOTHING
    of_what = "" if line["basis"] == "total" else f" of {line['basis']}"
    return f"{100 * line['target_sparsity']:.4g}%{of_what}"


def _average(line: Any) -> str:
    value, low, high = line["commonsense_avg"], line["commonsense_ci_low"], line["commonsense_ci_high"]
    if pd.isna(value):
        return NOTHING if line["status"] == "ok" else str(line["status"])
    sd = "" if pd.isna(line["commonsense_spread"]) else f" ± {percent(line['commonsense_spread'])}"
    tied = f" {TIED}" if line["best_or_tied"] == "tied" else ""
    return f"{percent(value)}{sd} [{percent(low)}, {percent(high)}]{tied}"


def _delta(line: Any) -> str:
    return signed_with_interval(line["delta_vs_dense"], line["delta_ci_low"], line["delta_ci_high"])


def _percent_of(task: str) -> Callable[[Any], str]:
    return lambda line: percent(line[task])


def _number(value: Any, unit: float, digits: int = 1) -> str:
    return NOTHING if pd.isna(value) else f"{value / unit:,.{digits}f}"


def _knob(line: Any) -> str:
    if not _text(line["knob"]):
        return NOTHING
    return ", ".join(f"{name} {value:.4g}" for name, value in json.loads(line["knob"]).items())


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)
