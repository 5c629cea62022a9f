"""From a name, hub id or folder to a model in memory with its tokenizer and structure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.errors import UserError, unknown_name
from harness.models import mobilellm
from harness.models.assemble import PRUNED_CLASSES, model_class
from harness.models.catalog import CATALOG
from harness.models.checkpoint import check_weights, parameter_shapes
from harness.models.embedded import embedded_checkpoint
from harness.records import Dtype, ModelRef, ParamCounts
from harness.structure import ModelStructure, count_parameters, describe

for _config_class, _model_class in PRUNED_CLASSES.values():
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with what methods need to know of it."""

    model: Any
    """A transformers causal language model in evaluation mode."""
    tokenizer: Any
    """The model's own."""
    weights_sha256: str
    """Of the checkpoint's weight files, in the order of their names."""

    @cached_property
    def structure(self) -> ModelStructure:
        """The coupled groups of ``model``."""
        return describe(self.model)

    @cached_property
    def params(self) -> ParamCounts:
        """Parameters of ``model``."""
        return count_parameters(self.model.named_parameters())


def load_model(ref: ModelRef, dtype: Dtype = "float32", device: str = "cpu") -> LoadedModel:
    """Load a checkpoint: from the catalog, from a local folder, or from the hub.

    Safetensors only, and never remote code.

    Raises:
        UserError: it cannot be reached, has no weights, or is not a model that can be pruned.
    """
    require_device(device)
    folder = checkpoint_folder(ref)
    try:
        model = _load_weights(folder, getattr(torch, dtype))
        tokenizer = _load_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(
            f"{folder} could not be loaded as a language model ({type(error).__name__}: {reason}); "
            "pass a complete save_pretrained folder"
        ) from error
    model.to(device).eval().requires_grad_(False)
    return LoadedModel(model=model, tokenizer=tokenizer, weights_sha256=weights_sha256(folder))


def _load_weights(folder: Path, dtype: torch.dtype) -> Any:
    values = read_config(folder)
    if values.get("model_type") == mobilellm.MODEL_TYPE:
        return mobilellm.load_mobilellm(folder, values, dtype)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    check_weights(folder, parameter_shapes(config, model_class(config)))
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Content of a checkpoint's ``config.json``.

    Raises:
        UserError: it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); pass a folder written by save_pretrained") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object; pass a folder written by save_pretrained")
    return values


def _load_tokenizer(folder: Path) -> Any:
    if read_config(folder).get("model_type") == mobilellm.MODEL_TYPE:
        return mobilellm.load_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def require_device(device: str) -> None:
    """Check that torch can compute on a device.

    Raises:
        UserError: the name is no device, or there is no such device here.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"device {device!r} cannot be used here ({reason}); pass --device cpu") from error


def fast_dtype(device: str) -> Dtype:
    """bfloat16 where a device multiplies it in hardware, else float32.

    Raises:
        UserError: the device cannot be used here.
    """
    require_device(device)
    if torch.device(device).type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8  # Ampere
    else:
        # Without these instructions bfloat16 is converted to float32 and back for every product.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def checkpoint_folder(ref: ModelRef) -> Path:
    """The local folder of a checkpoint, converted or downloaded first where necessary.

    Raises:
        UserError: the name is neither in the catalog, nor a folder, nor a hub id that can be downloaded here.
    """
    entry = CATALOG.get(ref.name)
    if entry is not None and entry.hub_id is None:
        return embedded_checkpoint()
    path = Path(ref.name).expanduser()
    if entry is None and (path.is_dir() or ref.name.startswith((".", "/", "~"))):
        if not path.is_dir():
            raise UserError(f"there is no model folder {ref.name}; pass a save_pretrained folder or a hub id")
        if not (path / "config.json").is_file():
            raise UserError(f"{ref.name} has no config.json; pass a folder written by save_pretrained")
        return path
    if entry is None and ref.name.count("/") != 1:
        raise unknown_name("model", ref.name, CATALOG, "harness models")
    hub_id, pinned = (entry.hub_id, entry.revision) if entry is not None else (None, None)
    return _download(hub_id or ref.name, ref.revision or pinned)


def weights_sha256(folder: Path) -> str:
    """Hash of every weight file of a checkpoint, in the order of their names; kept beside the embedded checkpoint.

    A folder may carry it in ``weights.sha256.json`` (name -> [size, mtime_ns, hash]), so that big checkpoints are read
    once.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(_file_sha256(path).encode())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    stat = path.stat()
    note = path.with_suffix(".sha256.json")
    if note.is_file():
        size, mtime, known = json.loads(note.read_text())
        if (size, mtime) == (stat.st_size, stat.st_mtime_ns):
            return str(known)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{hub_id} is gated: accept its licence at huggingface.co/{hub_id}, then `hf auth login`, or pass a folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {hub_id} that you may read; check the id (`harness models` lists known ones), "
            "log in with `hf auth login`, or pass a folder"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{hub_id} is not on this machine and the hub cannot be reached ({type(error).__name__}); "
            "download it elsewhere and pass its folder, or use the embedded model smollm2-135m"
        ) from error
