"""Tokens packed into windows of one length, in a fixed random order that any step can be found in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Windows of one step."""

    tokens_BT: Tensor  # noqa: N815 (shape letters)
    """int64."""
    scored_BT: Tensor  # noqa: N815
    """bool: the tokens whose prediction counts; never the first of a window."""


@dataclass(frozen=True)
class PackedText:
    """A text as one run of tokens (memory-mapped, say), read in windows."""

    tokens: NDArray[np.uint32]
    """[num_tokens]"""
    context_length: int
    scored: NDArray[np.bool_] | None = None
    """[num_tokens]: those that count; None counts all."""
    sha256: str | None = None
    """Of tokens and what counts of them, where it is known."""

    @property
    def num_windows(self) -> int:
        """Whole windows; what is left over is not read."""
        return len(self.tokens) // self.context_length

    def batch(self, first: int, size: int, seed: int) -> Batch:
        """``size`` windows from place ``first`` on in the endless order of windows.

        Every pass over the text has an order of its own, drawn from the seed: the same place is the same window
        whenever it is asked for.
        """
        windows = [self._window(place, seed) for place in range(first, first + size)]
        T = self.context_length
        spans = [slice(window * T, (window + 1) * T) for window in windows]
        tokens = np.stack([self.tokens[span].astype(np.int64) for span in spans])
        scored = np.ones(tokens.shape, np.bool_)
        if self.scored is not None:
            scored = np.stack([np.asarray(self.scored[span], np.bool_) for span in spans])
        scored[:, 0] = False
        return Batch(torch.from_numpy(tokens), torch.from_numpy(scored))

    def _window(self, place: int, seed: int) -> int:
        epoch, index = divmod(place, self.num_windows)
        if epoch not in self._orders(seed):
            self._orders(seed)[epoch] = np.random.default_rng([seed, epoch]).permutation(self.num_windows)
        return int(self._orders(seed)[epoch][index])

    def _orders(self, seed: int) -> dict[int, NDArray[np.int64]]:
        cache: dict[int, dict[int, NDArray[np.int64]]] = self.__dict__.setdefault("_order_cache", {})
        return cache.setdefault(seed, {})
