"""The dense model itself: the table's reference row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from harness.budget import unreachable
from harness.method import Footprint, LoadedModel, ParameterTarget, PrunedModel, PruningMethod


class Dense(PruningMethod):
    """Removes nothing."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = "the model as it was published"
    needs_calibration: ClassVar[bool] = False
    needs_seed: ClassVar[bool] = False

    def working_bytes(self, footprint: Footprint) -> int:
        """Nothing: the model itself is the answer."""
        return 0

    def prune(
        self, loaded: LoadedModel, calibration: Tensor, targets: Sequence[ParameterTarget], seed: int
    ) -> Iterator[PrunedModel]:
        """The model as it is for each target that it meets.

        Raises:
            UnreachableSparsityError: a target asks for less than the whole model.
        """
        for target in targets:
            if target.to_remove > 0:
                raise unreachable(self.name, target, 0)
            yield PrunedModel(loaded.model)
