"""Where commands write: what was asked for on standard output, what went wrong on standard error."""

from __future__ import annotations

from rich.console import Console

console = Console()
_stderr = Console(stderr=True)


def complain(sentence: str) -> None:
    """Say what went wrong, in one sentence."""
    _stderr.print(f"harness: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
