"""Weight files of a checkpoint folder: which tensors they hold, and whether those are what the configuration says.

All of it is read from the files' headers, so that a folder is refused before gigabytes are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from harness.errors import UserError
from harness.weights import StoredTensor, tensors_in

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Shapes = Mapping[str, tuple[int, ...]]


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


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors, by name: the one that transformers takes, else those of the index.

    Raises:
        UserError: there is none, or the index names one that is missing.
    """
    if (folder / SINGLE).is_file():  # an index beside it is left from an earlier save
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        single = sorted(folder.glob("*.safetensors"))
        if not single:
            raise UserError(f"{folder} holds no *.safetensors weights; pass a folder written by save_pretrained")
        return single
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is not an index of weight files; download the checkpoint again") from error
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} weight files are missing); "
            "download the checkpoint again"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of everything a checkpoint folder holds; only headers are read.

    Raises:
        UserError: a file is missing, cut off or no safetensors file.
    """
    return {name: tensor for path in weight_files(folder) for name, tensor in tensors_in(path).items()}


def parameter_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model (on the meta device, say), tied ones once."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if model.config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def check_weights(folder: Path, expected: Shapes) -> None:
    """Compare what is stored with what the configuration describes.

    A stored head of a model with tied embeddings is allowed where it equals the embedding.

    Raises:
        UserError: naming the first tensor that is missing, has another shape, or is not in the configuration.
    """
    stored = stored_tensors(folder)
    for name, shape in expected.items():
        if name not in stored:
            raise _contradiction(folder, f"there is no {name}, which config.json asks for")
        if stored[name].shape != shape:
            raise _contradiction(folder, f"{name} is {list(stored[name].shape)} where config.json says {list(shape)}")
    extra = [name for name in stored if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if extra == [HEAD]:
        if not torch.equal(stored[HEAD].read(), stored[EMBEDDING].read()):
            raise _contradiction(folder, "config.json ties the embeddings, but a head that differs is stored")
    elif extra:
        raise _contradiction(folder, f"{extra[0]} is stored, which config.json knows nothing of")


def _contradiction(folder: Path, what: str) -> UserError:
    return UserError(f"the weights in {folder} contradict its config.json: {what}; pass a complete checkpoint")
