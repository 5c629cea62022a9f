"""Reads the figures measured on the published LLM-Pruner, FLAP and SliceGPT (files of ``tests/golden``).

Kept units are in the dense model's numbering; a layer that a case does not list was kept whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.published import PublishedCase, PublishedFigures

MIB = 2**20


def kept_of(num_units: int, removed: Sequence[int]) -> frozenset[int]:
    """Units left of ``num_units`` when ``removed`` leave."""
    return frozenset(range(num_units)) - frozenset(removed)


def llm_pruner_cases(golden: Mapping[str, Any], intermediate_size: int) -> Iterator[PublishedCase]:
    """Every case of ``llm_pruner.json.gz``.

    Args:
        golden: the file's content.
        intermediate_size: MLP channels of a layer of the dense model.
    """
    for case in golden["cases"]:
        settings = case["settings"]
        first, end = settings["mlp_layers"]
        params = {
            "importance": settings["taylor"] or settings["pruner_type"],
            "grouping": settings["grouping_strategy"] if settings["taylor"] else "sum",
            "first_layer": first,
            "last_layer": end - 1,
        }
        kept = {}
        for layer in case["layers"]:
            prefix = f"layers.{layer['layer']}"
            kept[f"{prefix}.attention"] = frozenset(layer["kept_kv_heads"])
            kept[f"{prefix}.mlp"] = kept_of(intermediate_size, layer["removed_mlp_channels"])
        figures = PublishedFigures(
            params=case["params_after"],
            loss=case["heldout_loss"],
            kept=kept,
            seconds=case["seconds"]["total_s"],
            peak_bytes=int(case["peak_rss_mib"] * MIB),
        )
        yield PublishedCase(
            name=case["name"],
            method="llm-pruner",
            params=params,
            knob=settings["pruning_ratio"],
            calibration=(10, 64),
            figures=figures,
            multi_head=case["model"].endswith("-mha"),
        )


def flap_cases(golden: Mapping[str, Any], intermediate_size: int) -> Iterator[PublishedCase]:
    """Every case of ``flap.json.gz``, with its bias compensation.

    The grouped-query case is derived: the published code has no grouped-query attention, so its units were put together
    from the published scores of the multi-head model at their exact cost.
    """
    return (_flap_case(case, intermediate_size) for case in golden["cases"])


def _flap_case(case: Mapping[str, Any], intermediate_size: int) -> PublishedCase:
    settings, counts = case["settings"], case["params_after"]
    derived = "params_after_in_gqa_form" in case
    params = {
        "metric": settings["metrics"].lower(),
        "structure": settings["structure"].lower().replace("-", "_"),
        "remove_heads": settings["remove_heads"],
    }
    if derived:
        params["head_cost"] = case["head_cost_used"]
    total = case["params_after_in_gqa_form"]["total_excl_bias"] if derived else counts["total_excl_bias"]
    kept = {}
    for i, layer in enumerate(case["layers"]):
        kept[f"layers.{i}.attention"] = frozenset(layer["kept_heads"])
        kept[f"layers.{i}.mlp"] = kept_of(intermediate_size, layer["removed_mlp_channels"])
    return PublishedCase(
        name=case["name"],
        method="flap",
        params=params,
        knob=settings["pruning_ratio"],
        calibration=(64, 128),
        figures=PublishedFigures(
            params=total + counts["bias"],
            loss=case["eval_nll"],
            kept=kept,
            # The derived case was not run by itself.
            seconds=None if derived else case["prune_wall_s"],
            peak_bytes=None if derived else int(case["prune_peak_rss_mb"] * MIB),
        ),
        multi_head=not derived,
    )


def slicegpt_cases(golden: Mapping[str, Any], intermediate_size: int) -> Iterator[PublishedCase]:
    """The sliced cases of ``slicegpt.json.gz``: rotation alone, and slicing."""
    for case in golden["cases"].values():
        if "rotate_slice" not in case:
            continue
        yield PublishedCase(
            name=case["name"],
            method="slicegpt",
            params={"orientation": case["settings"]["final_orientation"]},
            knob=case["settings"]["sparsity"],
            calibration=(64, 128),
            figures=PublishedFigures(
                params=case["params_after"]["total_as_upstream"],
                loss=case["eval_nll"],
                kept=None,
                seconds=case["rotate_slice"]["wall_s"],
                peak_bytes=int(case["rotate_slice"]["peak_rss_mib"] * MIB),
            ),
            loss_tolerance=5e-3,
        )
