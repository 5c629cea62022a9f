"""From a model's name to the local folder of its checkpoint: converted, found or downloaded."""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError, unknown_name
from harness.models.catalog import CATALOG
from harness.models.embedded import embedded_checkpoint
from harness.records import ModelRef

PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
"""Files of a hub repository that are downloaded: no pickles and no code."""


def checkpoint_folder(ref: ModelRef) -> Path:
    """The local folder of a checkpoint, converted or downloaded first where necessary.

    Raises:
        UserError: the name is neither in the catalog, nor a folder, nor a hub id that can be downloaded here.
    """
    entry = CATALOG.get(ref.name)
    if entry is not None and entry.hub_id is None:
        return embedded_checkpoint()
    path = Path(ref.name).expanduser()
    if entry is None and is_local(ref.name):
        if not path.is_dir():
            raise UserError(f"there is no model folder {ref.name}; pass a save_pretrained folder or a hub id")
        if not (path / "config.json").is_file():
            raise UserError(f"{ref.name} has no config.json; pass a folder written by save_pretrained")
        return path
    if entry is None and ref.name.count("/") != 1:
        raise unknown_name("model", ref.name, CATALOG, "harness models")
    hub_id, pinned = (entry.hub_id, entry.revision) if entry is not None else (None, None)
    return download(hub_id or ref.name, ref.revision or pinned)


def is_local(name: str) -> bool:
    """Whether a name that is not in the catalog speaks of a folder on this machine."""
    return Path(name).expanduser().is_dir() or name.startswith((".", "/", "~"))


def download(hub_id: str, revision: str | None, *, only_config: bool = False) -> Path:
    """The snapshot folder of a hub checkpoint; what is there already is not downloaded again.

    Args:
        hub_id: owner/name.
        revision: branch, tag or commit; None is the main branch.
        only_config: fetch ``config.json`` alone.

    Raises:
        UserError: it is gated, unknown, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["config.json"] if only_config else list(PATTERNS)
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, log in with `hf auth login`, "
            "and run the same command again; or pass the folder of a copy"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {hub_id} that you may read; check the id (`harness models` lists known ones), "
            "log in with `hf auth login`, or pass a folder"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{hub_id!r} is no hub id; pass one (owner/name), a catalog name or a folder") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{hub_id} is not on this machine and the hub cannot be reached ({type(error).__name__}); "
            "download it elsewhere and pass its folder, or use the embedded model smollm2-135m"
        ) from error
