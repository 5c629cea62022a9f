"""Input statistics against a loop over sequences and torch's own variance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.activations import InputStatistics, input_statistics
from harness.models import LoadedModel

# A mean far from zero against the spread: a sum of squares minus a squared sum would lose its digits.
INPUTS = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 100


def published_recursion(inputs: Tensor) -> Tensor:
    """fluc_n = fluc_{n-1} (n-2)/(n-1) + S_n / n, S_n around the mean that sequence n already moved; fluc_1 = 0."""
    fluctuation = torch.zeros(inputs.shape[-1], dtype=torch.float64)
    for n in range(2, inputs.shape[0] + 1):
        mean = inputs[:n].flatten(0, 1).mean(0)
        around = (inputs[n - 1] - mean).square().sum(0)
        fluctuation = fluctuation * (n - 2) / (n - 1) + around / n
    return fluctuation


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_statistics_equal_a_loop_over_sequences(batch: int, dtype: torch.dtype, rtol: float) -> None:
    statistics = InputStatistics()
    for part in INPUTS.to(dtype).split(batch):
        statistics.add(part)
    tokens = INPUTS.flatten(0, 1)
    for found, expected in (
        (statistics.mean, tokens.mean(0)),
        (statistics.variance, tokens.var(0)),
        (statistics.power, INPUTS.square().sum(1).mean(0)),
        (statistics.running_fluctuation, published_recursion(INPUTS)),
    ):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


def test_the_first_sequence_counts_for_nothing_in_the_published_fluctuation() -> None:
    quiet, loud = torch.zeros(1, 4, 1), torch.tensor([[[-9.0], [9.0], [-9.0], [9.0]]])
    results = []
    for first in (quiet, loud):
        statistics = InputStatistics()
        statistics.add(torch.cat((first, quiet)))
        results.append((float(statistics.running_fluctuation), float(statistics.variance)))
    assert results[0] == (0.0, 0.0)
    assert results[1][0] == 0.0
    assert results[1][1] > 40


def test_inputs_of_the_named_maps_are_gathered_without_running_the_head(tiny: LoadedModel, calibration: Tensor) -> None:
    modules = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("self_attn.o_proj", "mlp.down_proj")]
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def listen(name: str) -> Any:
        return lambda _module, args: inputs[name].append(args[0])

    handles = [tiny.model.get_submodule(name).register_forward_pre_hook(listen(name)) for name in modules]
    tiny.model(calibration)
    for handle in handles:
        handle.remove()
    ran_head = []
    head = tiny.model.lm_head.register_forward_hook(lambda *_: ran_head.append(True))
    found = input_statistics(tiny.model, modules, calibration, micro_batch_tokens=40)
    head.remove()
    assert not ran_head
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())
    for name in modules:
        (whole,) = inputs[name]
        assert (found[name].num_sequences, found[name].num_tokens) == (6, 16)
        torch.testing.assert_close(found[name].mean, whole.flatten(0, 1).mean(0), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found[name].variance, whole.flatten(0, 1).var(0), rtol=1e-5, atol=0)
