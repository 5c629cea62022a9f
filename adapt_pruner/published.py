"""Reads the figures measured on the published Adapt-Pruner (a file of ``tests/golden``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from baselines.published import MIB, kept_of
from harness.published import PublishedCase, PublishedFigures

CALIBRATION = (16, 64)
"""The same tokens at every step, where the paper draws new ones."""


def adapt_pruner_cases(golden: Mapping[str, Any], intermediate_size: int) -> Iterator[PublishedCase]:
    """Every case of ``adapt_pruner.json.gz``; kept units are in the dense model's numbering.

    Args:
        golden: the file's content.
        intermediate_size: MLP channels of a layer of the dense model.
    """
    for case in golden["cases"]:
        settings = case["settings"]
        parts = case["time_split_s"]
        kept = {f"layers.{i}.attention": frozenset(heads) for i, heads in enumerate(case["kept_kv_head_indices"])}
        for i, removed in enumerate(case["removed_mlp_channels"]):
            kept[f"layers.{i}.mlp"] = kept_of(intermediate_size, removed)
        yield PublishedCase(
            name=case["name"],
            method="adapt-pruner",
            params={
                "amplitude": settings["amplitude"],
                "adaptive": settings["adaptive"],
                "importance": settings["taylor"] or settings["pruner"],
                "layer_importance": settings["layer_importance"],
            },
            knob=1 - settings["target_fraction"],
            calibration=CALIBRATION,
            figures=PublishedFigures(
                params=case["params_after"],
                loss=case["eval_nll_after"],
                kept=kept,
                seconds=case["wall_s"] - parts["rest"],  # loading the model, logging
                peak_bytes=int(case["peak_rss_mib"] * MIB),
            ),
        )
