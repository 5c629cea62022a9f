"""What all figures share: size, colours, markers, and how one becomes SVG or PNG. matplotlib is imported only here and
in `harness.report.page.figures`.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

# Okabe and Ito's palette, told apart with every common kind of colour blindness; markers differ too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_MARKERS = "osD^vP*X"
_LETTERS_AN_INCH = 9
"""Of a title beside a legend."""
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Figure:
    """A drawing and the words that belong to it."""

    name: str
    """Of its files, without a suffix."""
    title: str
    caption: str
    """What is drawn and how to read it; also for those who do not see it."""
    plot: Plot = field(repr=False)

    def svg(self) -> str:
        """As an SVG element whose ids clash with no other figure's on a page."""
        import matplotlib as mpl

        buffer = io.StringIO()
        with mpl.rc_context({**_SETTINGS, "svg.hashsalt": self.name}):
            self.plot.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = re.sub(r'\bid="', f'id="{self.name}-', text[text.index("<svg") :])
        return re.sub(r'(url\(#|href="#)', rf"\g<1>{self.name}-", text)

    def png(self) -> bytes:
        """As a bitmap of 200 dots per inch."""
        import matplotlib as mpl

        buffer = io.BytesIO()
        with mpl.rc_context(_SETTINGS):
            self.plot.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        return buffer.getvalue()


def new_plot(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Plot, Any]:
    """An empty drawing and its axes, [rows, columns].

    Args:
        width: inches.
        height: inches.
        rows: of axes.
        columns: of axes.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure as Plot
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'adapt-pruner-harness[report]'") from error
    with mpl.rc_context(_SETTINGS):
        plot = Plot(figsize=(width, height), layout="constrained")
        return plot, plot.subplots(rows, columns, squeeze=False)


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> colour and marker, the same in every figure of a page."""
    ordered = sorted(dict.fromkeys(names))
    return {
        name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]}
        for i, name in enumerate(ordered)
    }


def titled(axes: Any, text: str) -> None:
    """Write the title over the axes' left end, broken where the drawing is too narrow for it."""
    letters = int(axes.figure.get_figwidth() * _LETTERS_AN_INCH)
    axes.set_title(textwrap.fill(text, letters), loc="left", fontsize=10, fontweight="bold")


def grid_of_values(axes: Any, values: Any, rows: Iterable[str], columns: Iterable[str], **options: Any) -> Any:
    """Draw a matrix as coloured cells with names beside it; the image, for a colour bar."""
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    rows, columns = list(rows), list(columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return image
