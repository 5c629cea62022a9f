"""What the site takes from elsewhere when it is built: commands and methods from the code, committed tables."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from harness.cli import app
from harness.registry import known_methods, method_class

ROOT = Path(__file__).parents[1]
RESULTS = (
    "results/README.md",
    "results/reference/latest/leaderboard.md",
    "results/reference/standard/latest/leaderboard.md",
    "results/recovery/latest/leaderboard.md",
    "results/recovery-ablations/latest/leaderboard.md",
    "results/recovery/latest/figures/smollm2-135m-2-training.svg",
)
"""Committed files that are pages of the site, or shown in one."""


def on_files(files: Files, config: Any) -> Files:
    """Committed results join the pages."""
    for path in RESULTS:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page leaves to the code; links to results, which lie outside ``docs/``, stay in the site."""
    markdown = markdown.replace("<!-- commands -->", "\n".join(commands()))
    markdown = markdown.replace("<!-- methods -->", "\n".join(methods()))
    return markdown.replace("](../results/", "](results/")


def commands() -> Iterator[str]:
    """Every command with its flags."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield f"## harness {name}\n\n{inspect.cleandoc(command.help or '')}\n"
        yield "| | default | |\n|---|---|---|"
        for parameter in command.params:
            yield f"| {_names(parameter)} | {_default(parameter)} | {_cell(getattr(parameter, 'help', None) or '')} |"
        yield ""


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    shown = parameter.default
    return "" if shown in (None, False, [], ()) else f"`{shown}`"


def methods() -> Iterator[str]:
    """Every method with its settings: name, default, what the code says of it."""
    for name in known_methods():
        cls = method_class(name)
        yield f"## {name}\n\n{inspect.cleandoc(cls.__doc__ or '')}\n"
        if cls.model_fields:
            yield "| setting | default | |\n|---|---|---|"
        for setting, field in cls.model_fields.items():
            yield f"| `{setting}` | `{field.default}` | {_cell(field.description or '')} |"
        yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
