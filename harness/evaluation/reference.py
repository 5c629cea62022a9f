"""What the dense model makes of the held-out text: its last hidden states, which with its head are its distributions.

They are exact, and smaller than the distributions by vocabulary over hidden size (85 times for SmolLM2-135M). One file
serves every run of a comparison, read from the disk a batch at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.cpu import fast_matmul, matmul_library
from harness.durable import disk_errors, remove
from harness.evaluation.forest_pass import NonFiniteOutputError
from harness.evaluation.head import plain_head
from harness.evaluation.heldout_text import HeldOutText

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Dense:
    """The model that pruned ones are measured against."""

    model: PreTrainedModel
    weights_sha256: str
    """Of its checkpoint: part of the name of the file that keeps its states."""


@dataclass(frozen=True)
class DenseReference:
    """A dense model's reading of a text."""

    model: PreTrainedModel
    head: nn.Linear
    by_token: Floats
    """[num_tokens, hidden_size]: state t predicts token t + 1 of its window. On the disk where there is a folder."""

    def states(self, start: int, tokens_BT: Tensor) -> Tensor:
        """States of all tokens but the last of each window of a batch; [B * (T - 1), hidden_size].

        Args:
            start: the batch's first token in the text.
            tokens_BT: the batch.
        """
        num_windows, length = tokens_BT.shape
        some = torch.from_numpy(np.array(self.by_token[start : start + tokens_BT.numel()]))
        states = some.view(num_windows, length, -1)[:, :-1].flatten(0, 1)
        return states.to(device=self.head.weight.device, dtype=self.head.weight.dtype)


def dense_reference(
    dense: Dense, text: HeldOutText, batch_tokens: int, cache: Path | None = None
) -> DenseReference | str:
    """The dense model's states on a text; else why there are none.

    Args:
        dense: the model.
        text: of its tokenizer.
        batch_tokens: tokens run at once.
        cache: the folder where the states are kept for other processes; None keeps them in this one's memory.

    Raises:
        UserError: the folder cannot be written to or the disk is full.
        NonFiniteOutputError: the dense model is broken.
    """
    head = plain_head(dense.model)
    if isinstance(head, str):
        return head
    # float32 holds bfloat16 exactly; numpy has no such type.
    dtype = np.dtype(np.float64 if dense.model.dtype == torch.float64 else np.float32)
    shape = (len(text.tokens), head.in_features)
    if cache is None:
        found: Floats = np.concatenate(list(_states(dense.model, text, batch_tokens, dtype)))
        return DenseReference(dense.model, head, found)
    path = cache / f"heldout-{_identity(dense, text)}.npy"
    kept = _read(path, shape, dtype)
    if kept is None:
        _write(path, shape, dtype, _states(dense.model, text, batch_tokens, dtype))
        kept = _read(path, shape, dtype)
        assert kept is not None, f"{path} was just written"
    return DenseReference(dense.model, head, kept)


@torch.no_grad()
@fast_matmul()
def last_states(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Last hidden states, which the head reads; [B, T, hidden_size]."""
    tokens_BT = tokens_BT.to(model.get_input_embeddings().weight.device)
    hidden_BTC: Tensor = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTC


def _states(model: PreTrainedModel, text: HeldOutText, batch_tokens: int, dtype: np.dtype[Any]) -> Iterator[Floats]:
    """States of all tokens of a batch after another; [B * T, hidden_size]."""
    for _start, tokens_BT in text.batches(batch_tokens):
        states = last_states(model, tokens_BT).flatten(0, 1).to(torch.promote_types(model.dtype, torch.float32)).cpu()
        if not torch.isfinite(states).all():
            raise NonFiniteOutputError("the dense model gives NaN or infinity on the held-out text")
        yield states.numpy().astype(dtype, copy=False)


def _identity(dense: Dense, text: HeldOutText) -> str:
    """Hash of everything that can change the states."""
    parts = {
        "weights": dense.weights_sha256,
        "tokens": hashlib.sha256(text.tokens.numpy().tobytes()).hexdigest(),
        "length": text.length,
        "dtype": str(dense.model.dtype),
        "device": dense.model.get_input_embeddings().weight.device.type,
        "torch": torch.__version__,
        "matmul": matmul_library(),
        "transformers": version("transformers"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _read(path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> Floats | None:
    """The file, mapped into memory; None where it is absent or not what its name says."""
    try:
        found: Floats = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return found if found.shape == shape and found.dtype == dtype else None


def _write(path: Path, shape: tuple[int, int], dtype: np.dtype[Any], parts: Iterable[Floats]) -> None:
    """Under a name of its own first, so that a killed process leaves no half of a file under the right one."""
    fresh = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Through write(), not a writable map: a full disk is then an error and not a signal that kills.
            with fresh.open("wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(part.tobytes())
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except BaseException:
            remove(fresh)
            raise
