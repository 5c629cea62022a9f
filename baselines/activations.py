"""Statistics of the inputs of linear maps, gathered in one pass of the decoder blocks (no head, no logits).

Shape letters: B sequences, T tokens of a sequence, C input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.models import micro_batch_rows


class InputStatistics:
    """Mean and spread of one linear map's input channels over equally long sequences, per channel in float64: [C].

    Every batch is reduced per sequence to its mean and its squared deviations from that mean, in the inputs' own type
    (at least float32) and without cancellation; all that crosses sequences is float64.
    """

    def __init__(self) -> None:
        self.num_sequences = 0
        self.num_tokens = 0
        """Tokens of one sequence."""
        self.mean = torch.zeros((), dtype=torch.float64)
        """Over all tokens."""
        self._scatter = torch.zeros((), dtype=torch.float64)
        self._running = torch.zeros((), dtype=torch.float64)
        self._power = torch.zeros((), dtype=torch.float64)

    def add(self, inputs_BTC: Tensor) -> None:
        """Count in the inputs of a few sequences, in their order."""
        inputs = inputs_BTC.to(torch.promote_types(inputs_BTC.dtype, torch.float32))
        num_new, self.num_tokens = inputs.shape[:2]
        self.mean = self.mean.to(inputs.device)
        mean_BC = inputs.mean(1, keepdim=True)
        within_BC = (inputs - mean_BC).square_().sum(1).double()
        mean_BC = mean_BC.squeeze(1).double()
        index_B1 = self.num_sequences + torch.arange(1, num_new + 1, dtype=torch.float64, device=inputs.device)[:, None]
        running_BC = (self.mean * self.num_sequences + mean_BC.cumsum(0)) / index_B1
        before_BC = torch.cat((self.mean.expand_as(mean_BC[:1]), running_BC[:-1]))
        # S_n, the squared deviations of sequence n from the mean over sequences 1 .. n.
        around_BC = within_BC + self.num_tokens * (mean_BC - running_BC).square()
        self._running = self._running + (around_BC * ((index_B1 - 1) / index_B1)).sum(0)
        self._scatter = self._scatter + (
            within_BC + self.num_tokens * (mean_BC - before_BC) * (mean_BC - running_BC)
        ).sum(0)
        self._power = self._power + (within_BC + self.num_tokens * mean_BC.square()).sum(0)
        self.mean = running_BC[-1]
        self.num_sequences += num_new

    @property
    def variance(self) -> Tensor:
        """Sample variance over all tokens."""
        return self._scatter / (self.num_sequences * self.num_tokens - 1)

    @property
    def running_fluctuation(self) -> Tensor:
        """What FLAP's published update converges to: 1 / (N - 1) sum over n >= 2 of (n - 1) / n S_n.

        S_n are the squared deviations, summed over tokens, of sequence n from the mean over sequences 1 .. n.
        """
        return self._running / (self.num_sequences - 1)

    @property
    def power(self) -> Tensor:
        """Mean over sequences of the sum of squares over tokens."""
        return self._power / self.num_sequences


def input_statistics(
    model: Any,
    modules: Sequence[str],
    calibration: Tensor,
    *,
    micro_batch_tokens: int = 1024,
    bfloat16: bool = False,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of ``modules`` while the blocks run over the calibration batch.

    Args:
        model: a causal language model; left as it was.
        modules: names of linear maps.
        calibration: token ids [B, T], without padding.
        micro_batch_tokens: most tokens run at once (at least one sequence); does not change the result.
        bfloat16: let the matrix products run in bfloat16.

    Returns:
        Module name -> its input's statistics.
    """
    statistics = {name: InputStatistics() for name in modules}
    rows = micro_batch_rows(model, calibration.shape[1], micro_batch_tokens)
    with (
        torch.no_grad(),
        torch.autocast(calibration.device.type, torch.bfloat16, enabled=bfloat16),
        _listening(model, statistics),
    ):
        for start in range(0, calibration.shape[0], rows):
            model.model(input_ids=calibration[start : start + rows], use_cache=False)
    return statistics


@contextmanager
def _listening(model: Any, statistics: dict[str, InputStatistics]) -> Iterator[None]:
    def hook(gathered: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: gathered.add(args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(s)) for name, s in statistics.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
