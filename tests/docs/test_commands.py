"""Every command on the pages: it parses, and what can run here runs, at a reduced size."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from harness.cli import app

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}

ELSEWHERE = (
    "llama", "mobilellm", "cuda", "s3://", "ray", "/shared/", "hf auth", "accelerate launch", "--online", "git clone",
    "cd ", "pip install", "make ", "my-", "DIR", "qwen", "activation", "results/candidate",
)  # fmt: skip
"""What is not here: the hub, a GPU, a cluster, an environment of its own, files of the reader's."""

SMALL = {
    "compare": {
        "--limit": "2", "--heldout-tokens": "64", "--calibration-samples": "4", "--calibration-length": "64",
        "--sparsities": "0.2", "--methods": "dense,flap",
    },
    "prune": {"--calibration-samples": "4", "--calibration-length": "64"},
    "evaluate": {"--limit": "2", "--heldout-tokens": "64"},
    "accel": {"--tokens": "1k", "--rounds": "1", "--train": "batch_tokens=512"},
}  # fmt: skip
"""Flags that make a command's work small, whatever the page gives them."""
FINISHED = {"regress": (0, 1, 3), "doctor": (0, 1)}
"""Exit codes of an answer, where it is not only 0."""


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def is_elsewhere(self) -> bool:
        text = self.text
        if "--dry-run" in self.words or self.words[0] == "doctor":  # the catalog's shapes are here
            text = text.replace("llama-3.1-8b", "").replace("mobilellm", "")
        return any(part in text for part in ELSEWHERE)

    @property
    def made_small(self) -> list[str]:
        """The last of two values of a flag counts."""
        name, *words = self.words
        flags = dict(SMALL.get(name, {})) if "--dry-run" not in words else {}
        if name == "compare":
            flags |= {} if "--tasks" in words else {"--tasks": "arc_easy"}
            flags |= {"--recovery-tokens": "1k", "--train": "batch_tokens=512"} if "--recovery" in words else {}
            kept = [word for word in words if not word.startswith(("adapt-pruner.", "adapt-accel.", "slicegpt."))]
            words = [word for word in kept if word != "--set" or any(w.startswith("flap.") for w in kept)]
            words.append("--no-efficiency")
        return [name, *words, *(part for flag in flags.items() for part in flag)]


def commands(page: str) -> list[Command]:
    """The lines of its console blocks, comments and continuations taken away, several in a line taken apart."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", PAGES[page], re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(";"):
                words = shlex.split(part, comments=True)
                if words:
                    found.append(Command(page, tuple(words)))
    return found


def harness_commands(page: str) -> list[Command]:
    """Those of the harness, the program's name taken away."""
    ours = []
    for command in commands(page):
        program = Path(command.words[0]).name
        if program == "harness":
            ours.append(Command(page, command.words[1:]))
        elif "-m" in command.words and command.words[command.words.index("-m") + 1] == "harness":
            ours.append(Command(page, command.words[command.words.index("harness") + 1 :]))
    return ours


EVERY = [command for page in PAGES for command in harness_commands(page)]


@pytest.mark.parametrize("command", EVERY, ids=lambda command: f"{command.page}: {command.text}"[:80])
def test_flags_and_arguments_are_those_of_the_command_line(command: Command) -> None:
    group: Any = typer.main.get_command(app)
    name, *arguments = command.words
    group.commands[name].make_context(name, list(arguments))


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    texts = [command.text for page in PAGES for command in commands(page)]
    assert [part for part in ELSEWHERE if not any(part in text for text in texts)] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in PAGES if any(not c.is_elsewhere for c in harness_commands(page))])
def test_commands_run_in_the_order_of_the_page(page: str, tmp_path: Path) -> None:
    put_files(page, tmp_path)
    for command in harness_commands(page):
        if command.is_elsewhere:
            continue
        done = subprocess.run(
            [sys.executable, "-m", "harness.cli", *command.made_small], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode in FINISHED.get(command.words[0], (0,)), f"{command.text}\n{done.stderr[-2000:]}"


def put_files(page: str, folder: Path) -> None:
    """What the page shows as a file of the reader's: a task, and its documents."""
    if page == "docs/own-task.md":
        (definition,) = re.findall(r"```yaml\n(.*?)```", PAGES[page], re.DOTALL)
        (document,) = re.findall(r"lines such as `(\{.*?\})`", PAGES[page])
        (folder / "capitals.yaml").write_text(definition)
        (folder / "capitals.jsonl").write_text(f"{document}\n" * 3)
