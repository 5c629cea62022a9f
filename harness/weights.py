"""Weights in memory or in a file: a stored tensor stays there until it is read, and is cut like any other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.durable import disk_errors
from harness.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""How a safetensors header spells what weights can be."""

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
"""Bytes of a weight -> what reads its bits."""

VOCABULARY_ROWS = 16_384
"""Rows of an embedding or a head that are cast to a wider type at once."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, or some rows and columns of it, with a tensor's shape and none of its memory."""

    path: Path
    name: str
    """In the file."""
    shape: torch.Size
    """Of what is left after every selection."""
    dtype: torch.dtype
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """Dimension -> positions in the file that are left, in order; a dimension that is absent is whole."""
    holder: Any = None
    """What must live as long as the file is needed: the folder it disappears with."""

    device = torch.device("cpu")

    def detach(self) -> StoredTensor:
        """Itself: what is in a file has no gradient."""
        return self

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def index_select(self, dim: int, index: Tensor) -> StoredTensor:
        """Some of the rows (``dim`` 0) or columns (1), in the order of ``index``; nothing is read."""
        index = index.cpu()
        kept = {**self.kept, dim: self.kept[dim][index] if dim in self.kept else index}
        shape = torch.Size(index.numel() if d == dim else size for d, size in enumerate(self.shape))
        return replace(self, kept=kept, shape=shape)

    def read(self) -> Tensor:
        """The tensor: pages of the file itself where it is whole (mapped, so do not write to it), else a copy."""
        with _opened(self.path) as file:
            tensor: Tensor = file.get_tensor(self.name)
        for dim in sorted(self.kept):  # rows first: what they leave is contiguous
            tensor = tensor.index_select(dim, self.kept[dim])
        return tensor


Weight = Tensor | StoredTensor
"""A parameter, in memory or in a file."""


def read(weight: Weight) -> Tensor:
    """The tensor that a weight is, read where it is in a file."""
    return weight.read() if isinstance(weight, StoredTensor) else weight


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of everything in a safetensors file; only its header is read.

    Raises:
        UserError: it is cut off or is no safetensors file.
    """
    found = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            part = file.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise UserError(
                    f"{path} holds {name} as {part.get_dtype()}, a quantised or integer type; pass a checkpoint in "
                    f"{', '.join(DTYPES)}"
                )
            found[name] = StoredTensor(path, name, torch.Size(part.get_shape()), DTYPES[part.get_dtype()])
    return found


class Spool:
    """A temporary folder for tensors as they are made; it disappears with the last of them (``TMPDIR`` says where)."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="harness-weights-", ignore_cleanup_errors=True)
        self._files = 0

    def put(self, tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
        """Write some tensors to a file of their own.

        Raises:
            UserError: the disk is full.
        """
        path = Path(self._folder.name) / f"{self._files}.safetensors"
        self._files += 1
        with disk_errors(path.parent):
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        return {
            name: StoredTensor(path, name, tensor.shape, tensor.dtype, holder=self._folder)
            for name, tensor in tensors.items()
        }


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); download or write it again") from error


def fingerprint(parameters: Iterable[Tensor]) -> int:
    """A number that changes with almost any change of the weights: a hash of sums of their bits.

    Args:
        parameters: those on the meta device say nothing.
    """
    sums = [
        int(parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64))
        for parameter in parameters
        if parameter.device.type != "meta"
    ]
    return hash(tuple(sums))
