"""SliceGPT against the figures of its published implementation, on the embedded model and the same tokens."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines.slicegpt import SliceGPT, sliced_params
from baselines.slicegpt_rotation import SUBLAYERS, PrincipalAxes, SlicedWeights, Slicer, fused
from harness.models import LoadedModel, assemble

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads(gzip.decompress((FOLDER / "slicegpt.json.gz").read_bytes()))
CASES: dict[str, Any] = GOLDEN["cases"]
PUBLISHED = SliceGPT(**{**SliceGPT.published, "orientation": "pca"})  # type: ignore[arg-type]
LOSS_TOLERANCE = 5e-3


def tokens(name: str, rows: int) -> Tensor:
    return torch.from_numpy(np.load(FOLDER / f"{name}_tokens.npy")[:rows]).long()


def published(model: Any, **changes: bool) -> Slicer:
    return PUBLISHED.model_copy(update=changes).slicer(model, tokens("calibration", 64))


def heldout_loss(model: Any, num_batches: int = 2) -> float:
    with torch.inference_mode():
        batches = tokens("heldout", 8 * num_batches).split(8)
        return float(np.mean([float(model(rows, labels=rows).loss) for rows in batches]))


def first_layers(model: Any, num_layers: int) -> Any:
    """The model without its later layers, which no earlier signal depends on."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    later = tuple(f"model.layers.{i}." for i in range(num_layers, model.config.num_hidden_layers))
    return assemble(config, {name: tensor for name, tensor in model.named_parameters() if not name.startswith(later)})


def fused_model(model: Any, subtract_embedding_mean: bool) -> Any:
    """The model with its norm weights multiplied into the linear maps that read them, and ones in their place."""
    state = dict(model.named_parameters())
    state["model.embed_tokens.weight"] = published(model, subtract_embedding_mean=subtract_embedding_mean).embedding
    state["lm_head.weight"] = fused(model.lm_head.weight, model.model.norm.weight)
    for i, layer in enumerate(model.model.layers):
        for sublayer in SUBLAYERS:
            for reader in (f"model.layers.{i}.{sublayer.module}.{name}.weight" for name in sublayer.readers):
                state[reader] = fused(state[reader], getattr(layer, sublayer.norm).weight)
    ones = {name: torch.ones_like(tensor) for name, tensor in state.items() if name.endswith("norm.weight")}
    return assemble(model.config, state | ones)


def assert_signals_agree(signals: list[PrincipalAxes], case: dict[str, Any], relative: float) -> None:
    width = case["new_hidden_dimension"]
    for found, expected in zip(signals, case["pca"], strict=False):
        where = expected["signal"]
        assert float(found.energies.sum()) == pytest.approx(expected["trace_undamped"], rel=relative), where
        assert found.explained(width) == pytest.approx(expected["explained_if_cut_to_d"], abs=relative), where
        leading = found.energies[:5].tolist()
        assert leading == pytest.approx(expected["eig_top5"], rel=relative), where


def assert_norms_agree(state: dict[str, Tensor], figures: dict[str, float], layers: set[int], relative: float) -> None:
    checked = 0
    for name, expected in figures.items():
        if name.startswith("layers.") and int(name.split(".")[1]) not in layers:
            continue
        ours = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}.get(
            name, f"model.{name}".replace("_shortcut_Q", "_shortcut.weight")
        )
        if ours in state:
            assert float(state[ours].detach().double().norm()) == pytest.approx(expected, rel=relative), name
            checked += 1
    assert checked >= 7 * len(layers)


def assert_shortcuts_agree(
    state: dict[str, Tensor], figures: dict[str, Any], layers: range, mean: float, smallest: float
) -> None:
    for i in layers:
        for kind in ("attn", "mlp"):
            matrix = state[f"model.layers.{i}.{kind}_shortcut.weight"].double()
            values = torch.linalg.svdvals(matrix)
            assert list(matrix.shape[::-1]) == figures[str(i)][f"{kind}_shape"]
            assert float(values.mean()) == pytest.approx(figures[str(i)][f"{kind}_sv_mean"], abs=mean), (i, kind)
            assert float(values.min()) == pytest.approx(figures[str(i)][f"{kind}_sv_min"], abs=smallest), (i, kind)


def test_counted_parameters_equal_the_published_table(smollm2: LoadedModel) -> None:
    for width, row in GOLDEN["formula"]["table"].items():
        kept, sliced = (sliced_params(smollm2.model, int(width), slice_head) for slice_head in (False, True))
        figures = row["default"]
        assert kept.total == figures["total_as_upstream"]
        assert kept.embedding == figures["embeddings"] + figures["lm_head"]
        assert kept.attention == figures["attention"]
        assert kept.mlp == figures["mlp"]
        assert kept.extra == figures["shortcut_attn"] + figures["shortcut_mlp"]
        assert sliced.total == row["slice_head_total"]


def test_first_layers_agree_with_the_published_ones(smollm2: LoadedModel) -> None:
    case = CASES["s20"]
    found = published(first_layers(smollm2.model, 3)).to_width(456)
    assert_signals_agree(found.signals[:5], case, 1e-5)
    assert_norms_agree(found.state, case["frobenius_norms"], {0, 1}, 1e-5)
    assert_shortcuts_agree(found.state, case["shortcut_singular_values"], range(2), 1e-6, 1e-4)


@pytest.mark.parametrize(("name", "subtract_embedding_mean"), [("fuse", True), ("fuse_nomean", False)])
def test_fusion_has_the_published_norms_and_loss(
    smollm2: LoadedModel, name: str, subtract_embedding_mean: bool
) -> None:
    case = CASES[name]
    model = fused_model(smollm2.model, subtract_embedding_mean)
    state = dict(model.named_parameters())
    weightless = sum(tensor.numel() for key, tensor in state.items() if not key.endswith("norm.weight"))
    assert weightless == case["params_after"]["total_as_upstream"]
    assert_norms_agree(state, case["frobenius_norms"], {0, 1, 14, 29}, 1e-6)
    assert heldout_loss(model, num_batches=1) == pytest.approx(case["batch_losses"][0], abs=2e-5)


@pytest.mark.slow
def test_dense_loss_is_the_published_one(smollm2: LoadedModel) -> None:
    assert heldout_loss(smollm2.model) == pytest.approx(CASES["dense"]["eval_nll"], abs=2e-5)


@pytest.fixture(scope="module")
def rotated(smollm2: LoadedModel) -> SlicedWeights:
    return published(smollm2.model).to_width(576)


@pytest.fixture(scope="module")
def sliced(smollm2: LoadedModel) -> SlicedWeights:
    return published(smollm2.model).to_width(456)


@pytest.mark.slow
def test_rotation_has_the_published_axes_and_the_dense_loss(smollm2: LoadedModel, rotated: SlicedWeights) -> None:
    case = CASES["rot0"]
    assert sum(tensor.numel() for tensor in rotated.state.values()) == case["params_after"]["total_as_upstream"]
    assert_signals_agree(rotated.signals, case, 1e-4)
    assert_norms_agree(rotated.state, case["frobenius_norms"], {0, 1, 14, 29}, 1e-5)
    assert_shortcuts_agree(rotated.state, case["shortcut_singular_values"], range(30), 1e-6, 1e-5)
    loss = heldout_loss(assemble(smollm2.model.config, rotated.state))
    assert loss == pytest.approx(case["eval_nll"], abs=2e-5)


@pytest.mark.slow
def test_full_width_with_the_embedding_mean_has_the_dense_loss(smollm2: LoadedModel) -> None:
    whole = published(smollm2.model, subtract_embedding_mean=False).to_width(576)
    loss = heldout_loss(assemble(smollm2.model.config, whole.state))
    assert loss == pytest.approx(CASES["dense"]["eval_nll"], abs=1e-5)


@pytest.mark.slow
def test_slicing_has_the_published_axes_widths_and_loss(smollm2: LoadedModel, sliced: SlicedWeights) -> None:
    case = CASES["s20"]
    assert sum(tensor.numel() for tensor in sliced.state.values()) == case["params_after"]["total_as_upstream"]
    for name, shape in case["shapes"].items():
        if "shortcut" not in name and name.startswith("layers."):
            assert list(sliced.state[f"model.{name}"].shape) == shape
    assert_signals_agree(sliced.signals, case, 1e-4)
    assert_norms_agree(sliced.state, case["frobenius_norms"], {0, 1, 14, 29}, 1e-4)
    assert_shortcuts_agree(sliced.state, case["shortcut_singular_values"], range(30), 1e-4, 1e-2)
    loss = heldout_loss(assemble(smollm2.model.config, sliced.state))
    assert loss == pytest.approx(case["eval_nll"], abs=LOSS_TOLERANCE)
