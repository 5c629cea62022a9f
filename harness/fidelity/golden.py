"""The figures measured on published implementations, as data: which files, and the fixed tokens beside them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.errors import UserError
from harness.published import PublishedCase
from harness.registry import published_reader
from harness.structure import ModelStructure

CHECKOUT_FOLDER = Path(__file__).parents[2] / "tests" / "golden"
"""Where the figures are in a checkout; an installed package does not bring them."""

HELDOUT_BATCHES, HELDOUT_ROWS = 2, 8
"""The published losses are means over two batches of eight held-out rows."""


@dataclass(frozen=True)
class Golden:
    """A folder of measured figures."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "heldout_tokens.npy").is_file():
            raise UserError(
                f"{self.folder} holds no measured figures (heldout_tokens.npy is missing); "
                "pass the tests/golden folder of a checkout to --golden"
            )

    def cases(self, method: str, structure: ModelStructure) -> tuple[PublishedCase, ...]:
        """Every measured run of a method.

        Args:
            method: its name in the registry.
            structure: of the dense model the runs began with.

        Raises:
            UserError: the folder has no figures of it.
        """
        path = self.folder / f"{method.replace('-', '_')}.json.gz"
        if not path.is_file():
            raise UserError(f"{path} does not exist: there are no published figures to hold {method} against")
        content = json.loads(gzip.decompress(path.read_bytes()))
        return tuple(published_reader(method)(content, structure.mlp[0].num_units))

    def calibration(self, shape: Sequence[int]) -> Tensor:
        """First rows and columns of the calibration token ids, int64."""
        rows, columns = shape
        return self._tokens("calibration")[:rows, :columns]

    def heldout_batches(self) -> tuple[Tensor, ...]:
        """The held-out token ids that losses are measured on, int64 [8, 256] each."""
        return torch.split(self._tokens("heldout")[: HELDOUT_BATCHES * HELDOUT_ROWS], HELDOUT_ROWS)

    @cache  # noqa: B019  one folder per process
    def _tokens(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}_tokens.npy")).long()
