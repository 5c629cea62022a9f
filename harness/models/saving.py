"""Pruned models on disk: a save_pretrained folder that loads with this package and without it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file

from harness.durable import disk_errors, sync_folder
from harness.errors import UserError
from harness.models import modeling_pruned
from harness.models.checkpoint import INDEX
from harness.models.hashes import write_sums
from harness.models.streaming import streamed
from harness.weights import Weight, read

SHARD_BYTES = 5 * 10**8
"""Of a streamed model's files, each of which is put together in memory."""


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
    require_new(out)
    with _whole_folder(out) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card)
        if type(model).__module__ == modeling_pruned.__name__:
            _add_modelling_file(model, folder)
        _make_saveable(model)
        # The weights come last, so that a folder whose weights are whole is whole.
        if (how := streamed(model)) is None:
            model.save_pretrained(folder)
        else:
            _save_configs(model, folder)
            write_shards(how.state, folder)
        write_sums(folder)
        _sync(folder)


def require_new(out: Path) -> None:
    """Fail before the work rather than after it.

    Raises:
        UserError: ``out`` exists, or nothing can be written beside it.
    """
    with disk_errors(out.parent):
        if out.exists():
            raise UserError(f"{out} exists already; remove it or pass another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass


def write_shards(state: Mapping[str, Weight], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write weights as a checkpoint's safetensors files, reading those of one file at a time.

    Args:
        state: parameters by name, tied ones once.
        folder: that of the checkpoint.
        shard_bytes: most bytes of one file, but for a tensor that is larger.
    """
    split = split_state_dict_into_shards_factory(
        dict(state),
        get_storage_size=lambda weight: weight.numel() * weight.dtype.itemsize,
        get_storage_id=lambda _weight: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: read(state[name]).cpu().contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _save_configs(model: Any, folder: Path) -> None:
    """What ``save_pretrained`` writes beside weights that are in memory."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.get_input_embeddings().weight.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _make_saveable(model: Any) -> None:
    """Mend a generation config that transformers reads and refuses to write: sampling settings without sampling."""
    if not model.can_generate():
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


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
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
