"""Every command on the pages: run in the order of its page; what cannot run here is read by the real command line."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from harness.cli import app
from harness.models.embedded import embedded_checkpoint
from harness.models.loading import load_tokenizer
from harness.request import comparison_from, evaluation_spec, model_ref

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}

NOT_HERE = {
    "needs the hub": (
        "README.md: harness prune --model llama-3.1-8b",
        "docs/large-models.md: harness prune --model llama-3.1-8b",
        "docs/own-task.md: harness compare --methods flap --tasks wikitext --online",
        "docs/paper-setting.md: hf auth login",
        "docs/training.md: harness accel --recipe mobilellm-350m-to-125m --out",
    ),
    "needs a GPU, and the hub": (
        "docs/large-models.md: harness compare --models llama-3.1-8b",
        "docs/paper-setting.md: harness doctor",
        "docs/paper-setting.md: harness compare",
        "docs/paper-setting.md: harness accel --recipe mobilellm-350m-to-125m --device cuda",
        "docs/paper-setting.md: harness evaluate",
        "docs/training.md: accelerate launch",
    ),
    "needs Slurm, a Ray cluster or a bucket": (
        "docs/clusters.md: harness compare --models llama-3.1-8b",
        "docs/clusters.md: harness compare --methods all --executor ray",
        "docs/clusters.md: harness report s3://bucket/results",
    ),
    "installs into the environment, or needs another program": (
        "docs/clusters.md: pip install",
        "docs/export.md: llama-cli",
    ),
    "tests/docs/test_adding_a_method.py runs it, on one model": (
        "docs/adding-a-method.md: pytest tests/contract -k activation-norm",
    ),
}  # fmt: skip
"""Why -> how the commands begin that are not run."""

SLOW = (
    "README.md", "docs/adding-a-method.md", "docs/ci.md", "docs/clusters.md", "docs/export.md", "docs/own-model.md",
    "docs/own-task.md", "docs/training.md",
)  # fmt: skip
"""Pages whose commands take more than some twenty seconds."""

WORDS = {"DIR": "results/reference", "/shared/results": "shared/results"}
"""Stand-ins for what a reader puts there."""

CALIBRATION = ("--calibration-samples", "8", "--calibration-length", "64")
LESS = {
    "compare": ("--limit", "2", "--heldout-tokens", "512", "--no-efficiency", *CALIBRATION),
    "prune": CALIBRATION,
    "evaluate": ("--limit", "2", "--heldout-tokens", "512"),
}
"""Added to a command so that it does the same with less; of two values of a flag the last counts."""
LESS_TRAINING = ("--train", "batch_tokens=512", "--train", "context_length=64")
REAL_MODEL = ("docs/export.md", "docs/own-task.md")
"""Pages whose commands get the embedded model where they name none; the others' get a small one of random weights."""

EXIT_CODES = {"regress": (0, 3), "doctor": (0, 1)}
"""Of commands that did their work, where it is not 0 alone: too few documents to tell, a machine that cannot."""


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"

    @property
    def why_not_run(self) -> str | None:
        return next((why for why, starts in NOT_HERE.items() if str(self).startswith(starts)), None)

    @property
    def arguments(self) -> list[str] | None:
        """Of `harness`, launched by whatever; None where it is another program."""
        words = list(self.words)
        return words[words.index("harness") + 1 :] if "harness" in words else None


def commands_of(page: str) -> Iterator[Command]:
    """Each command of the blocks for a terminal, continued lines joined, comments and programs' folders taken off."""
    for block in re.findall(r"```(?:console|bash)\n(.*?)```", PAGES[page], re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            reader = shlex.shlex(line, posix=True, punctuation_chars=";")
            reader.whitespace_split, reader.commenters = True, "#"
            for words in _split(list(reader)):
                yield Command(page, (words[0].removeprefix(".venv/bin/"), *words[1:]))


def _split(words: list[str]) -> Iterator[list[str]]:
    while ";" in words:
        yield words[: words.index(";")]
        words = words[words.index(";") + 1 :]
    if words:
        yield words


COMMANDS = [command for page in PAGES for command in commands_of(page)]
READ = [command for command in COMMANDS if command.arguments is not None]
RUN = [page for page in PAGES if any(c.page == page and c.why_not_run is None for c in COMMANDS)]


def read_by_the_command_line(arguments: list[str]) -> typer.Context:
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    assert name in group.commands, f"no command {name}"
    context: typer.Context = group.commands[name].make_context(name, rest)
    return context


@pytest.mark.parametrize("command", READ, ids=str)
def test_the_command_line_knows_the_command_and_its_flags(command: Command) -> None:
    assert command.arguments is not None
    context = read_by_the_command_line(command.arguments)
    if command.why_not_run is None:  # it is run, which says more
        return
    values = context.params
    if context.info_name == "compare":
        comparison_from(values, (), None)
    if context.info_name == "evaluate":
        names = ("tasks", "profile", "limit", "mmlu_limit", "mmlu_shots", "heldout_tokens", "offline")
        evaluation_spec(*(values[name] for name in names))
    if context.info_name in ("prune", "doctor"):
        model_ref(values["model"])


def test_a_flag_that_does_not_exist_is_found() -> None:
    with pytest.raises(Exception, match="--sparsity"):
        read_by_the_command_line(["compare", "--sparsity", "0.2"])


def test_every_reason_not_to_run_a_command_has_one() -> None:
    for starts in NOT_HERE.values():
        for start in starts:
            assert any(str(command).startswith(start) for command in COMMANDS), start
    assert set(SLOW) <= set(RUN)
    assert set(REAL_MODEL) <= set(RUN)


def test_flags_in_the_text_exist_too() -> None:
    """`harness COMMAND --flag` in a sentence: the command has such a flag."""
    group: Any = typer.main.get_command(app)
    for page, text in PAGES.items():
        for name, rest in re.findall(r"`(?:\.venv/bin/)?harness ([a-z]+)((?: [^`]*)?)`", text):
            assert name in group.commands, f"{page}: harness {name}"
            known = {flag for p in group.commands[name].params for flag in (*p.opts, *p.secondary_opts)}
            assert set(re.findall(r"(?<= )--[a-z-]+", rest)) <= known | {"--help"}, f"{page}: harness {name}{rest}"


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the embedded model's tokenizer.

    Most are in MLPs, so that 40% of all can leave; with these sizes SliceGPT's columns come near the pages' sparsities.
    """
    config = LlamaConfig(
        vocab_size=49152, hidden_size=144, intermediate_size=5184, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=16, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small")
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(embedded_checkpoint()).save_pretrained(folder)
    return folder


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in RUN])
def test_the_commands_of_a_page_run_in_their_order(page: str, tmp_path: Path, small_model: Path) -> None:
    put_files(page, tmp_path, small_model)
    model = None if page in REAL_MODEL else str(small_model)
    to_run = [command for command in commands_of(page) if command.why_not_run is None]
    assert to_run
    for command in to_run:
        run(reduced(command, model), tmp_path, allowed=EXIT_CODES.get((command.arguments or [""])[0], (0,)))
    if page == "docs/tutorial.md":
        run_code(page, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_as_it_stands_takes_ten_minutes(tmp_path: Path) -> None:
    started = time.monotonic()
    for command in commands_of("docs/tutorial.md"):
        if command.arguments is not None:
            run([sys.executable, "-m", "harness.cli", *command.arguments], tmp_path)
    run_code("docs/tutorial.md", tmp_path)
    assert time.monotonic() - started < 600
    table = pd.read_csv(tmp_path / "results" / "tutorial" / "latest" / "leaderboard.csv").set_index("method")
    assert table.loc["slicegpt", "sparsity_total"] == pytest.approx(0.1979, abs=5e-5)


def run(words: list[str], folder: Path, allowed: tuple[int, ...] = (0,)) -> str:
    """What a command prints; it must end as allowed."""
    path = os.pathsep.join((str(ROOT), str(folder / "site")))
    done = subprocess.run(
        words, cwd=ROOT if words[0] == "make" else folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode in allowed, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_code(page: str, folder: Path) -> None:
    """The page's Python, where its commands left their files."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    assert run([sys.executable, "-c", code], folder).startswith("The capital of France is")


def reduced(command: Command, model: str | None) -> list[str]:
    """The words to run: this Python's program, stand-ins, and less of the same."""
    program, *rest = (WORDS.get(word, word) for word in command.words)
    if program == "make":
        return ["make", "--dry-run", *rest]  # that there is such a target
    if program == "lm_eval":
        return [sys.executable, "-m", "lm_eval", *rest, "--limit", "2"]
    assert program == "harness", f"{command} is not of a kind that is run; give it a reason in NOT_HERE"
    name, *flags = rest
    added = list(LESS.get(name, ()))
    if name == "compare" and "--tasks" not in flags:
        added += ["--tasks", "arc_easy,piqa"]
    if "--recovery" in flags:
        added += ["--recovery-tokens", "5k", *LESS_TRAINING]
    if name == "accel" and "--dry-run" not in flags:
        added += ["--tokens", "5k", *LESS_TRAINING]
    if model is not None and name in ("compare", "prune", "accel") and "--dry-run" not in flags:
        flag = "--models" if name == "compare" else "--model"
        added += [] if any(word.startswith("my-model") for word in flags) else [flag, model]
    if model is not None and name == "evaluate" and "--reference" in flags:
        added += ["--reference", model]
    return [sys.executable, "-m", "harness.cli", name, *flags, *added]


def put_files(page: str, folder: Path, small_model: Path) -> None:
    """What a page takes for granted: files of the reader's, and committed runs."""
    reference = ROOT / "results" / "reference"
    if page == "README.md":
        (toml,) = re.findall(r"```toml\n(.*?)```", PAGES[page], re.DOTALL)
        (folder / "my-comparison.toml").write_text(toml)
        shutil.copytree(reference, folder / "results" / "reference")
    if page == "docs/ci.md":  # of the reference's runs the dense one alone, as --run makes all of them
        (dense,) = (reference / "ci" / "runs").glob("*--dense--*")
        for side in ("reference", "candidate"):
            shutil.copytree(dense, folder / "results" / side / "runs" / dense.name)
    if page == "docs/own-model.md":
        shutil.copytree(small_model, folder / "my-model")
        (folder / "my-text.txt").write_text("\n\n".join(PAGES.values()))
    if page == "docs/own-task.md":
        write_task(PAGES[page], folder)
    if page == "docs/adding-a-method.md":
        install_plugin(PAGES[page], folder)


def write_task(text: str, folder: Path) -> None:
    """The page's task and three times its document."""
    (folder / "capitals.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    (folder / "capitals.jsonl").write_text(f"{re.findall(r'lines such as `({.*?})`', text)[0]}\n" * 3)


def install_plugin(text: str, folder: Path) -> None:
    """The page's method, in a folder that Python looks into."""
    source = folder / "source"
    source.mkdir()
    for kind, name in (("python", "activation_norm.py"), ("toml", "pyproject.toml")):
        (source / name).write_text(re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[0])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(source)], check=True)
