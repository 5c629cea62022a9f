"""The card of a saved model: only the runs that scored this very model are quoted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from harness.budget import ParameterTarget
from harness.card import Origin, Outcome, matching, model_card
from harness.records import LayerWidths, RunRecord

LAYERS = (
    LayerWidths(num_key_value_heads=3, intermediate_size=1200),
    LayerWidths(num_key_value_heads=2, intermediate_size=0),
)


@pytest.fixture
def scored(make_spec: Callable[..., Any], make_documents: Callable[..., Any], make_record: Callable[..., RunRecord]
) -> tuple[Origin, Outcome, RunRecord]:  # fmt: skip
    spec = make_spec("flap", 0.2, method_params={"metric": "wifv"})
    record = make_record(spec, make_documents(spec), layers=LAYERS)
    target = ParameterTarget(0.2, "total", record.params_before)
    origin = Origin(spec.model, "flap", {"metric": "wifv"}, target, 0, "float32", spec.calibration, "ab" * 32)
    outcome = Outcome(record.params_after, LAYERS, {"pruning_ratio": 0.25}, "PrunedLlamaForCausalLM", True)
    return origin, outcome, record


def test_the_card_says_base_method_settings_sizes_and_scores(scored: tuple[Origin, Outcome, RunRecord]) -> None:
    origin, outcome, record = scored
    card = model_card(origin, outcome, matching([record], origin, outcome))
    for part in (
        "base_model: smollm2-135m",
        "# smollm2-135m, 20% pruned with flap",
        "| all parameters | 134,515,008 | 107,612,006 | 20.00% |",
        "| mlp | 79,626,240 | 52,723,238 | 33.79% |",
        "kv heads by layer: [3, 2]. MLP widths by layer: [1200, 0].",
        "- metric: wifv",
        "- pruning_ratio: 0.25",
        f"Run `{record.spec.run_id}` (50 documents a task; harness 0.1.0, 0123abc):",
        "| heldout/ppl_token | 27.5000 |",
        "`trust_remote_code=True`",
    ):
        assert part in card, part


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"dtype": "bfloat16"}, {"params": {"metric": "ifv"}}, {"method": "random"}, {"calibration": None},
     {"weights_sha256": "cd" * 32}],
    ids=str,
)  # fmt: skip
def test_a_run_of_anything_else_is_not_quoted(
    scored: tuple[Origin, Outcome, RunRecord], change: dict[str, Any]
) -> None:
    origin, outcome, record = scored
    other = replace(origin, **change)
    assert matching([record], origin, outcome) == [record]
    assert matching([record], other, outcome) == []
    assert "No run with these settings was on record" in model_card(other, outcome, [])


def test_a_run_that_ended_at_other_widths_is_not_quoted(scored: tuple[Origin, Outcome, RunRecord]) -> None:
    origin, outcome, record = scored
    assert matching([record], origin, replace(outcome, layers=LAYERS[:1])) == []
