"""What is counted, by numbers worked out by hand; what is timed, by the order and arithmetic of its turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from baselines.slicegpt import SliceGPT
from harness.inference_cost import (
    LiveBytes,
    Turn,
    interleaved_turns,
    macs_per_token,
    measure_inference,
    peak_bytes,
    speeds,
    weight_bytes,
)
from harness.method import ParameterTarget
from harness.models import LoadedModel, remove_units
from harness.records import EfficiencySpec
from harness.report.efficiency import COLUMNS

MakeTiny = Callable[..., LoadedModel]
PROMPT = torch.arange(2 * 16).view(2, 16)
HEAD = 96 * 48
Q_AND_O = 2 * 48 * 48
K_AND_V = 2 * 16 * 48
MLP = 3 * 80 * 48
ATTENTION = 2 * 16 * 48  # 16 keys for each of 48 query and 48 output numbers
DENSE_MACS = HEAD + 3 * (Q_AND_O + K_AND_V + MLP + ATTENTION)
SPEC = EfficiencySpec(batch_size=2, prompt_tokens=16, new_tokens=3, repeats=2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_macs_of_a_dense_model(implementation: str, make_tiny: MakeTiny) -> None:
    model = make_tiny("grouped-query", torch.float32).model
    model.set_attn_implementation(implementation)
    assert macs_per_token(model, PROMPT) == DENSE_MACS


def test_macs_of_a_model_with_its_own_widths_in_every_layer(make_tiny: MakeTiny) -> None:
    loaded = make_tiny("grouped-query", torch.float32)
    plan = {
        "layers.0.attention": torch.tensor([1]),
        "layers.1.mlp": torch.arange(35),
        "layers.2.attention": torch.tensor([], dtype=torch.int64),
    }
    smaller = remove_units(loaded.model, loaded.structure, plan)
    half_attention = (Q_AND_O + K_AND_V + ATTENTION) // 2
    assert macs_per_token(smaller, PROMPT) == DENSE_MACS - half_attention - 3 * 45 * 48 - 2 * half_attention


def test_macs_of_slicegpt_have_its_shortcuts(make_tiny: MakeTiny, calibration: torch.Tensor) -> None:
    loaded = make_tiny("grouped-query", torch.float32)
    sliced = next(SliceGPT().prune(loaded, calibration, [ParameterTarget(0.2, "total", loaded.params)], 0)).model
    width = sliced.config.residual_size
    last = sliced.config.head_size or width
    blocks = 3 * (Q_AND_O + K_AND_V + MLP) * width // 48 + 3 * ATTENTION
    shortcuts = 3 * width * width + 2 * width * width + width * last
    # the last layer's down projection, like its shortcut, makes what the head reads
    assert macs_per_token(sliced, PROMPT) == blocks + shortcuts + 80 * (last - width) + 96 * last


def test_weight_bytes_count_a_tied_tensor_once(make_tiny: MakeTiny) -> None:
    tied = make_tiny("tied", torch.float32)
    assert weight_bytes(tied.model) == 4 * tied.params.total
    assert weight_bytes(make_tiny("tied", torch.bfloat16).model) == 2 * tied.params.total


def test_live_bytes_peak_where_most_tensors_are_alive_at_once() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        c = b.view(10, 100)  # no bytes of its own
        assert live.now == 8000
        del a
        assert live.now == 4000
        b += 1
        c = c.sum(0)
        del b
        assert live.now == 400
        torch.zeros(900)
    assert live.peak == 8000
    assert c.numel() == 100


def test_peak_holds_the_weights_the_cache_and_the_prompts_activations(make_tiny: MakeTiny) -> None:
    loaded = make_tiny("grouped-query", torch.float32)
    cache = 2 * 3 * 2 * (16 + 3) * 16 * 4  # keys and values, layers, sequences, tokens, 2 kv heads of 8, bytes
    gate_and_up = 2 * 2 * 16 * 80 * 4
    grown = peak_bytes(loaded.model, PROMPT, 3) - weight_bytes(loaded.model)
    assert cache < grown < 3 * (cache + gate_and_up)
    plan = {group.name: torch.arange(20) for group in loaded.structure.mlp}
    smaller = remove_units(loaded.model, loaded.structure, plan)
    assert peak_bytes(smaller, PROMPT, 3) - weight_bytes(smaller) <= grown
    assert peak_bytes(smaller, PROMPT, 3) == peak_bytes(smaller, PROMPT, 3)


def test_models_take_turns_and_alternate_in_who_begins(make_tiny: MakeTiny) -> None:
    model, dense = make_tiny("tied", torch.float32).model, make_tiny("grouped-query", torch.float32).model
    calls: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        return lambda _module, _args, kwargs: calls.append((name, kwargs["input_ids"].shape[1]))

    model.register_forward_pre_hook(note("model"), with_kwargs=True)
    dense.register_forward_pre_hook(note("dense"), with_kwargs=True)
    ours, theirs = interleaved_turns(model, dense, PROMPT, SPEC)
    assert [name for name, length in calls if length == 16] == ["dense", "model", "model", "dense", "dense", "model"]
    assert len(calls) == 6 * (1 + SPEC.new_tokens)
    assert len(ours) == len(theirs) == SPEC.repeats


def test_speeds_are_medians_and_ratios_are_taken_turn_by_turn() -> None:
    spec = EfficiencySpec(batch_size=2, prompt_tokens=10, new_tokens=4, repeats=3)
    ours = [Turn(0.5, 2.0), Turn(1.0, 1.0), Turn(4.0, 4.0)]
    theirs = [Turn(1.0, 2.0), Turn(1.5, 4.0), Turn(20.0, 2.0)]
    found = {measure.name: measure.value for measure in speeds(ours, theirs, spec)}
    assert found == {
        "efficiency/first_token_seconds": 1.0,
        "efficiency/prefill_tokens_per_second": 2 * 10 / 1.0,
        "efficiency/prefill_tokens_per_second_vs_dense": 2.0,  # of 2, 1.5 and 5
        "efficiency/decode_tokens_per_second": 2 * 4 / 2.0,
        "efficiency/decode_tokens_per_second_vs_dense": 1.0,  # of 1, 4 and 0.5
    }


def test_every_measure_has_a_column(make_tiny: MakeTiny) -> None:
    loaded = make_tiny("grouped-query", torch.float32)
    plan = {group.name: torch.arange(20) for group in loaded.structure.mlp}
    smaller = remove_units(loaded.model, loaded.structure, plan)
    measures = measure_inference(smaller, loaded.model, SPEC)
    assert sorted(measure.name for measure in measures) == sorted(COLUMNS.values())
    assert all(measure.value > 0 for measure in measures)
    by_name = {measure.name: measure.value for measure in measures}
    assert by_name["efficiency/macs_per_token"] == DENSE_MACS - 3 * 3 * 60 * 48
