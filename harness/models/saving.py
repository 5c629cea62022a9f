"""Pruned models on disk: a save_pretrained folder that loads with this package and without it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from harness.durable import disk_errors, sync_folder
from harness.errors import UserError
from harness.models import modeling_pruned
from harness.models.hashes import write_sums


def save_model(model: Any, tokenizer: Any, out: Path, card: str) -> None:
    """Write a model folder, whole or not at all.

    A stock model is saved as it is. A pruned one carries its modelling file, so that
    ``from_pretrained(out, trust_remote_code=True)`` loads it where this package is not installed; where it is,
    importing ``harness.models`` is enough.

    Args:
        model: stock or pruned causal language model.
        tokenizer: saved beside it; None saves none.
        out: must not exist yet.
        card: text of the folder's README.md.

    Raises:
        UserError: ``out`` exists, cannot be written, or the disk is full.
    """
    refuse_existing(out)
    with _whole_folder(out) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card)
        if type(model).__module__ == modeling_pruned.__name__:
            _add_modelling_file(model, folder)
        # The weights come last, so that a folder whose weights are whole is whole.
        model.save_pretrained(folder)
        write_sums(folder)
        _sync(folder)


def refuse_existing(out: Path) -> None:
    """Fail before the work rather than after it.

    Raises:
        UserError: ``out`` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already; remove it or pass another --out")


def _add_modelling_file(model: Any, folder: Path) -> None:
    source = Path(modeling_pruned.__file__)
    shutil.copyfile(source, folder / source.name)
    model.config.auto_map = {
        "AutoConfig": f"{source.stem}.{type(model.config).__name__}",
        "AutoModelForCausalLM": f"{source.stem}.{type(model).__name__}",
    }


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its name when the block ends well, and is removed when it does not."""
    with disk_errors(out.parent), _safetensors_errors():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = Path(scratch) / out.name
            folder.mkdir()
            yield folder
            os.replace(folder, out)
            sync_folder(out.parent)


@contextlib.contextmanager
def _safetensors_errors() -> Iterator[None]:
    """Turn what safetensors says of the disk into the OSError that it was."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code)) from error


def _sync(folder: Path) -> None:
    """Bring every file to the disk: a full disk shows here, and no rename precedes its data."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
