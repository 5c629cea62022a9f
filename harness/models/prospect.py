"""A model before it is there: its shapes from the catalog or from ``config.json`` alone, and what fetching it costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from harness.errors import UserError
from harness.models import mobilellm
from harness.models.assemble import pruned_form, without_weights
from harness.models.catalog import CATALOG, GATED, CatalogEntry
from harness.models.checkpoint import read_config
from harness.models.source import checkpoint_folder, download, is_local
from harness.records import ModelRef

BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Prospect:
    """What is known of a model without its weights."""

    source: str
    """Where it comes from, as a reader is told."""
    model: PreTrainedModel
    """On the meta device."""
    download_bytes: int
    """Still to be downloaded: 0 where the weights are here."""
    gated: bool
    """Whether its licence must be accepted first."""
    cache: Path
    """Where downloads go."""


def prospect(ref: ModelRef) -> Prospect:
    """Look at a model's shapes; nothing but a ``config.json`` is downloaded, and nothing at all for catalog models.

    Raises:
        UserError: there is no such model, or it is not one that can be built.
    """
    entry = CATALOG.get(ref.name)
    if entry is not None and entry.hub_id is not None:
        return _listed(entry, entry.hub_id, ref)
    if entry is not None or is_local(ref.name):
        folder = checkpoint_folder(ref)
        return _seen(f"{folder}", model_config(folder), 0, gated=False)
    folder = download(ref.name, ref.revision, only_config=True)
    values = read_config(folder)
    stored = BYTES_PER_WEIGHT.get(str(values.get("dtype", values.get("torch_dtype"))), 4)
    seen = _seen(ref.name, model_config(folder), stored, gated=False)
    return seen if not is_downloaded(ref.name) else _seen(ref.name, model_config(folder), 0, gated=False)


def is_downloaded(hub_id: str) -> bool:
    """Whether the hub cache holds weights of a model."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    return any(folder.glob("*/*.safetensors"))


def _listed(entry: CatalogEntry, hub_id: str, ref: ModelRef) -> Prospect:
    config_class = Qwen2Config if entry.shape.architecture == "qwen2" else LlamaConfig
    config: PreTrainedConfig = config_class(**entry.shape.config_values())
    if entry.shape.layer_repeats > 1:
        config = pruned_form(config)
    stored = 0 if is_downloaded(hub_id) else BYTES_PER_WEIGHT[entry.stored_dtype]
    return _seen(f"{ref.name} ({hub_id})", config, stored, gated=GATED in entry.note and stored > 0)


def model_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint folder's model as it is built here.

    Raises:
        UserError: it describes none.
    """
    values = read_config(folder)
    try:
        if values.get("model_type") == mobilellm.MODEL_TYPE:
            config = mobilellm.llama_config(values)
            return pruned_form(config) if config.layer_repeats > 1 else config
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers' code runs into
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/config.json describes no model that can be built ({reason})") from error


def _seen(source: str, config: PreTrainedConfig, stored_bytes_per_weight: int, *, gated: bool) -> Prospect:
    model = without_weights(config)
    download_bytes = stored_bytes_per_weight * sum(parameter.numel() for parameter in model.parameters())
    return Prospect(source, model, download_bytes, gated, Path(constants.HF_HUB_CACHE))
