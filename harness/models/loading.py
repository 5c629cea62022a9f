"""From a name, hub id or folder to a model in memory with its tokenizer and structure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.errors import UserError, first_line
from harness.models import mobilellm
from harness.models.assemble import without_weights
from harness.models.checkpoint import check_weights, parameter_shapes, read_config
from harness.models.hashes import weights_sha256
from harness.models.source import checkpoint_folder
from harness.models.streaming import stream_checkpoint
from harness.records import Dtype, ModelRef, ParamCounts
from harness.structure import ModelStructure, count_parameters, describe

SEVERAL = "auto"
"""As a device: accelerate spreads the layers over the GPUs there are, then the CPU, then the disk."""


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


def load_model(ref: ModelRef, dtype: Dtype = "float32", device: str = "cpu", *, stream: bool = False) -> LoadedModel:
    """Load a checkpoint: from the catalog, from a local folder, or from the hub.

    Safetensors only, and never remote code.

    Args:
        ref: which.
        dtype: that it computes in.
        device: where; ``auto`` spreads it over several.
        stream: leave the layers in their files and read them when they run (``harness.models.streaming``).

    Raises:
        UserError: it cannot be reached, has no weights, or is not a model that can be pruned.
    """
    if device != SEVERAL:
        require_device(device)
    elif stream:
        raise UserError("--stream runs one layer at a time on one device; name one instead of --device auto")
    folder = checkpoint_folder(ref)
    try:
        digest = weights_sha256(folder)
        if stream:
            model: Any = stream_checkpoint(folder, getattr(torch, dtype), device)
        else:
            model = read_model(folder, getattr(torch, dtype), "auto" if device == SEVERAL else None)
        tokenizer = load_tokenizer(folder)
    except UserError:
        raise
    except Exception as error:  # transformers raises what its code runs into, for a damaged or unusual configuration
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(
            f"{folder} could not be loaded as a language model ({type(error).__name__}: {reason}); "
            "pass a complete save_pretrained folder"
        ) from error
    if device != SEVERAL and not stream:
        model.to(device)
    model.eval().requires_grad_(False)
    return LoadedModel(model=model, tokenizer=tokenizer, weights_sha256=digest)


def read_model(folder: Path, dtype: torch.dtype, device_map: str | None = None) -> Any:
    """The model of a checkpoint folder, its weights checked against its configuration before they are read.

    Raises:
        UserError: they contradict each other, or a file is damaged or missing.
        Exception: what transformers raises for a configuration that it cannot make a model of.
    """
    values = read_config(folder)
    if values.get("model_type") == mobilellm.MODEL_TYPE:
        if device_map is not None:
            raise UserError("a MobileLLM checkpoint cannot be spread over several devices; name one with --device")
        return mobilellm.load_mobilellm(folder, values, dtype)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    check_weights(folder, parameter_shapes(without_weights(config)))
    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        device_map=device_map,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        Exception: what transformers raises where there is none.
    """
    if read_config(folder).get("model_type") == mobilellm.MODEL_TYPE:
        return mobilellm.load_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def main_device(device: str) -> str:
    """The device that inputs go to: the one that was named, or the first of several."""
    if device != SEVERAL:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(device: str) -> None:
    """Check that torch can compute on a device.

    Raises:
        UserError: the name is no device, or there is no such device here.
    """
    if device == "meta":
        raise UserError("device 'meta' holds no numbers to compute with; pass --device cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} cannot be used here ({first_line(error)}); pass --device cpu") from error


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
