"""The figures of a report, from its rows and numbers: accuracy against size and speed, tasks, widths, importances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from harness.records import RunRecord
from harness.report.frame import CHANCE, task_columns
from harness.report.notes import row_name
from harness.report.page.canvas import Figure, grid_of_values, new_plot, styles, titled
from harness.report.rows import REFERENCE_METHOD, Row
from harness.report.scores import MMLU

_TICKS = 8
_DASHES = ("-", "--", ":", "-.")
"""One a sparsity."""
_SHADES, _FILLS = (1.0, 0.75, 0.5, 0.35), ("full", "none", "left", "top")
"""One a row of the same method and sparsity."""


@dataclass(frozen=True)
class Panel:
    """What one figure may show together: the rows of one model that were trained alike, in one precision."""

    name: str
    """For file names."""
    heading: str
    """Model, and whatever else tells it from the page's other panels."""
    frame: pd.DataFrame
    """The lines of the leaderboard, scored ones only, with chance."""
    rows: tuple[Row, ...]
    """Scored ones."""


def draw(panel: Panel) -> Iterator[Figure]:
    """Every figure that the panel's runs have the numbers for."""
    style = styles(method for method in panel.frame["method"] if method != CHANCE)
    for axis in _AXES:
        yield from _against(panel, style, *axis)
    yield from _tasks(panel)
    yield from _widths(panel)
    yield from _importances(panel)
    yield from _losses(panel, style)


_AXES = (
    ("size", "parameters, millions", "accuracy against size", lambda line: line["params_total"] / 1e6),
    (
        "latency",
        "milliseconds a generated token",
        "accuracy against speed",
        lambda line: 1e3 / line["decode_tokens_per_second"],
    ),
)


def _against(panel: Panel, style: Mapping[str, Any], name: str, label: str, title: str, x_of: Any) -> Iterator[Figure]:
    """Averages with their intervals over a cost, and the front that no other point beats in both."""
    lines = panel.frame[panel.frame["commonsense_avg"].notna() & (panel.frame["method"] != CHANCE)]
    points = [(float(x_of(line)), line) for _, line in lines.iterrows()]
    points = [(x, line) for x, line in points if np.isfinite(x)]
    if len(points) < 2:
        return
    plot, ((axes,),) = new_plot(6.4, 4.0)
    for at, (_, line) in zip(side_by_side([x for x, _ in points]), points, strict=True):
        mean = 100 * line["commonsense_avg"]
        errors = [[mean - 100 * line["commonsense_ci_low"]], [100 * line["commonsense_ci_high"] - mean]]
        axes.errorbar(at, mean, yerr=errors, capsize=2, linewidth=1, linestyle="", **style[line["method"]])
    front = pareto_front([(x, line["commonsense_avg"]) for x, line in points])
    axes.plot(
        [points[i][0] for i in front],
        [100 * points[i][1]["commonsense_avg"] for i in front],
        color="#555555",
        linewidth=1,
        linestyle="--",
        zorder=0,
    )
    _chance_line(axes, panel.frame)
    for method in dict.fromkeys(line["method"] for _, line in points):
        axes.plot([], [], linestyle="", label=method, **style[method])
    axes.plot([], [], color="#555555", linewidth=1, linestyle="--", label="front")
    axes.set(xlabel=label, ylabel="commonsense average, %")
    titled(axes, f"{panel.heading}: {title}")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    best = ", ".join(f"{points[i][1]['method']} at {points[i][0]:.1f}" for i in front)
    caption = (
        f"Commonsense average with its 95% interval over {label}, a point a row of the table; points that would hide "
        f"each other stand side by side. The dashed front joins the rows that no other beats in both: {best}."
    )
    yield Figure(f"{panel.name}-{name}", title.capitalize(), caption, plot)


def side_by_side(places: Sequence[float]) -> list[float]:
    """Places moved apart where they are closer than 1.5% of the range, evenly around where they were."""
    step = 0.015 * (max(places) - min(places)) or 1.0
    moved, order = list(places), sorted(range(len(places)), key=lambda i: places[i])
    first = 0
    for last in range(1, len(order) + 1):
        if last < len(order) and places[order[last]] - places[order[last - 1]] < step:
            continue
        members = order[first:last]
        middle = sum(places[i] for i in members) / len(members)
        for rank, i in enumerate(members):
            moved[i] = middle + step * (rank - (len(members) - 1) / 2)
        first = last
    return moved


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both (less cost, higher score), by rising cost."""
    best, front = float("-inf"), []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def _chance_line(axes: Any, frame: pd.DataFrame) -> None:
    chance = frame.loc[frame["method"] == CHANCE, "commonsense_avg"].dropna()
    if len(chance):
        axes.axhline(100 * chance.iloc[0], color="#999999", linewidth=1, linestyle=":")
        axes.annotate("chance", (0, 100 * chance.iloc[0]), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")


def _tasks(panel: Panel) -> Iterator[Figure]:
    """Accuracy of every row on every task; the colour says how far it is from dense."""
    frame = panel.frame
    tasks = [task for task in [*task_columns(panel.rows), MMLU] if frame[task].notna().any()]
    dense = frame[frame["method"] == REFERENCE_METHOD]
    lines = frame[~frame["method"].isin([CHANCE])]
    if not tasks or dense.empty or len(lines) < 2:
        return
    scores = 100 * lines[tasks].to_numpy(dtype=float)
    change = scores - 100 * dense[tasks].iloc[0].to_numpy(dtype=float)
    limit = max(float(np.nanmax(np.abs(change))), 1.0)
    plot, ((axes,),) = new_plot(1.8 + 0.75 * len(tasks), 1.2 + 0.3 * len(lines))
    options = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    image = grid_of_values(axes, change, map(row_name, panel.rows), tasks, **options)
    axes.tick_params(axis="x", rotation=30)
    for (i, j), score in np.ndenumerate(scores):
        if np.isfinite(score):
            dark = abs(change[i, j]) > 0.6 * limit
            axes.text(j, i, f"{score:.1f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    plot.colorbar(image, ax=axes, label="points from dense")
    titled(axes, f"{panel.heading}: accuracy by task, %")
    caption = "Accuracy in percent of every row on every task; red cells lost against dense, blue ones won."
    yield Figure(f"{panel.name}-tasks", "Accuracy by task", caption, plot)


def _widths(panel: Panel) -> Iterator[Figure]:
    """What is left of every layer, one line a row: the picture of what was removed where."""
    shown = [row for row in panel.rows if row.records[0].layers]
    depth = max((len(row.records[0].layers) for row in shown), default=0)
    if len(shown) < 2:
        return
    plot, panes = new_plot(8.6, 1.6 + 0.36 * len(shown), 1, 2)
    told = []
    for axes, (unit, title) in zip(
        panes[0], (("intermediate_size", "MLP channels"), ("num_key_value_heads", "kv heads")), strict=True
    ):
        counts = np.full((len(shown), depth), np.nan)
        for i, row in enumerate(shown):
            layers = row.records[0].layers
            counts[i, : len(layers)] = [getattr(layer, unit) for layer in layers]
        share = counts / np.nanmax(counts)
        names = [row_name(row) for row in shown] if axes is panes[0][0] else [""] * len(shown)
        ticks = [str(layer) if layer % 5 == 0 else "" for layer in range(depth)]
        image = grid_of_values(axes, 100 * share, names, ticks, cmap="viridis", vmin=0, vmax=100)
        axes.set(title=title, xlabel="layer")
        told.append(f"{title} from {np.nanmin(counts):.0f} to {np.nanmax(counts):.0f} a layer")
    plot.colorbar(image, ax=list(panes[0]), label="left, % of the widest layer")
    plot.suptitle(f"{panel.heading}: what is left of every layer", fontsize=10, fontweight="bold")
    caption = (
        f"Units left in every layer, a line a row of the table (its first seed): {'; '.join(told)}. A method that cuts "
        "the residual stream leaves these counts as they are."
    )
    yield Figure(f"{panel.name}-widths", "What was removed where", caption, plot)


def _importances(panel: Panel) -> Iterator[Figure]:
    """How a method's view of the layers changes from step to step, where it keeps a trace of it."""
    traced = {row: steps for row in panel.rows if (steps := importance_steps(row.records[0]))}
    for row, steps in traced.items():
        plot, ((axes,),) = new_plot(6.4, 1.6 + 0.12 * len(steps))
        depth = len(steps[0])
        ticks = [str(layer) if layer % 5 == 0 else "" for layer in range(depth)]
        every = max(1, -(-len(steps) // _TICKS))
        labels = [str(step + 1) if step % every == 0 else "" for step in range(len(steps))]
        low, high = np.percentile(steps, [5, 95])
        image = grid_of_values(axes, np.array(steps), labels, ticks, cmap="magma", vmin=low, vmax=high)
        plot.colorbar(image, ax=axes, label="importance (5th to 95th percentile)", extend="both")
        axes.set(xlabel="layer", ylabel="step")
        titled(axes, f"{panel.heading}: layer importance, {row_name(row)}")
        caption = (
            f"Importance that {row_name(row)} gave each of {depth} layers before each of its {len(steps)} steps; "
            "bright layers were spared."
        )
        name = f"{panel.name}-importance-{row.records[0].spec.run_id.rpartition('-')[2]}"
        yield Figure(name, f"Layer importance over the steps, {row_name(row)}", caption, plot)


def importance_steps(record: RunRecord) -> list[list[float]]:
    """``layer_importance`` of every step in a run's trace, [steps, layers]; empty where it keeps none."""
    steps = record.trace.get("steps")
    if not isinstance(steps, list):
        return []
    found = [step.get("layer_importance") for step in steps if isinstance(step, dict)]
    kept = [[float(x) for x in values] for values in found if isinstance(values, list)]  # type: ignore[arg-type]
    return kept if len(kept) > 1 and len({len(values) for values in kept}) == 1 else []


def _losses(panel: Panel, style: Mapping[str, Any]) -> Iterator[Figure]:
    """Held-out loss over the tokens trained on, where it was measured on the way."""
    curves = {row: curve for row in panel.rows if len(curve := heldout_curve(row.records[0])) > 1}
    if not curves:
        return
    plot, ((axes,),) = new_plot(6.4, 4.0)
    drawn: Counter[tuple[float, str]] = Counter()
    sparsities = sorted({row.spec.sparsity for row in curves})
    for row, curve in sorted(curves.items(), key=lambda item: (item[0].spec.sparsity, row_name(item[0]))):
        alike = row.spec.sparsity, row.spec.method
        shade = {"alpha": _SHADES[drawn[alike] % len(_SHADES)], "fillstyle": _FILLS[drawn[alike] % len(_FILLS)]}
        drawn[alike] += 1
        dash = _DASHES[sparsities.index(row.spec.sparsity) % len(_DASHES)]
        tokens, losses = zip(*curve, strict=True)
        look = {"linestyle": dash, "linewidth": 1, "markersize": 4, **style[row.spec.method], **shade}
        axes.plot(tokens, losses, label=row_name(row), **look)
    axes.set(xlabel="tokens trained on", ylabel="held-out loss, nats a token")
    axes.xaxis.set_major_formatter(lambda tokens, _position: f"{tokens / 1e3:g}k" if tokens else "0")
    titled(axes, f"{panel.heading}: training")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ends = ", ".join(f"{row_name(row)} {curve[-1][1]:.3f}" for row, curve in curves.items())
    yield Figure(f"{panel.name}-training", "Held-out loss over training", f"Held-out loss at the end: {ends}.", plot)


def heldout_curve(record: RunRecord) -> list[tuple[float, float]]:
    """(tokens trained on, held-out loss) pairs of a run's training; empty where none were measured."""
    training = record.trace.get("training")
    points = training.get("heldout") if isinstance(training, dict) else None
    if not isinstance(points, list):
        return []
    pairs = [point for point in points if isinstance(point, list)]
    return [(float(tokens), float(loss)) for tokens, loss in pairs]  # type: ignore[arg-type]
