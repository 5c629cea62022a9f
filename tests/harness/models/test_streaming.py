"""Streamed models: what they compute, prune and save is what models in memory do, with one layer in memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness.budget import ParameterTarget
from harness.errors import UserError
from harness.evaluation.forest_pass import score_tails
from harness.method import PrunedModel
from harness.models import LoadedModel, remove_units, state_of
from harness.models.checkpoint import INDEX, stored_tensors
from harness.models.saving import save_model, write_shards
from harness.models.streaming import stream_checkpoint
from harness.registry import build_method, known_methods
from harness.structure import count_parameters
from harness.weights import read

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
COMPETITORS = [name for name in known_methods() if name != "dense"]
MakeTiny = Callable[..., LoadedModel]


def streamed_from(model: Any, folder: Path, dtype: torch.dtype | None = None) -> LoadedModel:
    """A model as its own checkpoint's layers, read when they run."""
    save_model(model, None, folder, "card")
    return LoadedModel(stream_checkpoint(folder, dtype or model.dtype, "cpu"), None, "streamed")


def weights(model: Any) -> dict[str, Tensor]:
    return {name: read(weight) for name, weight in state_of(model).items()}


def said(model: Any) -> dict[str, Any]:
    """What a configuration says but for where it was read from."""
    return {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}


def test_logits_are_those_of_the_model_in_memory(any_tiny: LoadedModel, calibration: Tensor, tmp_path: Path) -> None:
    streamed = streamed_from(any_tiny.model, tmp_path / "dense")
    assert torch.equal(streamed.model(calibration).logits, any_tiny.model(calibration).logits)
    assert all(p.is_meta for p in streamed.model.model.layers.parameters())
    assert streamed.params == any_tiny.params
    assert streamed.structure.groups == any_tiny.structure.groups


@pytest.mark.parametrize("name", COMPETITORS)
def test_pruning_gives_the_weights_that_it_gives_in_memory(
    name: str, any_tiny: LoadedModel, calibration: Tensor, tmp_path: Path
) -> None:
    method = build_method(name)
    if (reason := method.why_unsupported(any_tiny.structure)) is not None:
        pytest.skip(reason)
    streamed = streamed_from(any_tiny.model, tmp_path / "dense")

    def pruned(loaded: LoadedModel) -> list[PrunedModel]:
        targets = [ParameterTarget(sparsity, "total", loaded.params) for sparsity in (0.05, 0.15)]
        return list(method.prune(loaded, calibration, targets, seed=0))

    for ours, expected in zip(pruned(streamed), pruned(any_tiny), strict=True):
        found, wanted = weights(ours.model), dict(expected.model.named_parameters())
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.allclose(found[key], tensor, rtol=1e-9, atol=1e-12), key
        assert said(ours.model) == said(expected.model)
        assert torch.allclose(ours.model(calibration).logits, expected.model(calibration).logits)
        assert all(p.is_meta for p in ours.model.model.layers.parameters())


@pytest.mark.parametrize("criterion", ["l1", "param_second", "param_mix", "vectorize"])
def test_every_criterion_scores_alike(criterion: str, make_tiny: MakeTiny, calibration: Tensor, tmp_path: Path) -> None:
    loaded = make_tiny("grouped-query")
    streamed = streamed_from(loaded.model, tmp_path / "dense")
    method: Any = build_method("llm-pruner", {"importance": criterion})
    ours, expected = method.scores(streamed, calibration), method.scores(loaded, calibration)
    assert all(torch.allclose(ours[name], expected[name], rtol=1e-9) for name in expected)


def test_bfloat16_files_compute_in_float32(make_tiny: MakeTiny, calibration: Tensor, tmp_path: Path) -> None:
    stored = make_tiny("tied", torch.bfloat16).model
    streamed = streamed_from(stored, tmp_path / "dense", torch.float32).model
    logits = streamed(calibration).logits
    assert logits.dtype == torch.float32
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.allclose(logits, resident(calibration).logits, atol=1e-6)


def test_a_cut_of_a_cut_reads_the_rows_and_columns_of_the_first(make_tiny: MakeTiny, tmp_path: Path) -> None:
    loaded = make_tiny("grouped-query")
    first = {"layers.0.mlp": torch.arange(0, 80, 2), "layers.1.attention": torch.tensor([1])}
    then = {"layers.0.mlp": torch.tensor([0, 3, 39])}
    cut, expected = streamed_from(loaded.model, tmp_path / "dense").model, loaded.model
    for plan in (first, then):
        cut, expected = (remove_units(m, LoadedModel(m, None, "").structure, plan) for m in (cut, expected))
    for name, tensor in expected.named_parameters():
        assert torch.equal(weights(cut)[name], tensor), name
    assert count_parameters(cut.named_parameters()) == count_parameters(expected.named_parameters())


def test_models_made_of_one_share_what_is_outside_the_layers(make_tiny: MakeTiny, tmp_path: Path) -> None:
    streamed = streamed_from(make_tiny("grouped-query").model, tmp_path / "dense")
    smaller = streamed.model
    for _ in range(3):
        structure = LoadedModel(smaller, None, "").structure
        plan = {group.name: torch.arange(group.num_units - 1) for group in structure.mlp}
        smaller = remove_units(smaller, structure, plan)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert smaller.get_parameter(name).data_ptr() == streamed.model.get_parameter(name).data_ptr()


@pytest.mark.parametrize("name", ["magnitude", "flap", "slicegpt"])
def test_a_pruned_model_is_saved_in_the_files_type_and_loads(
    name: str, make_tiny: MakeTiny, calibration: Tensor, tmp_path: Path
) -> None:
    streamed = streamed_from(make_tiny("biased", torch.bfloat16).model, tmp_path / "dense", torch.float32)
    target = ParameterTarget(0.1, "total", streamed.params)
    (pruned,) = build_method(name).prune(streamed, calibration, [target], seed=0)
    save_model(pruned.model, None, tmp_path / "pruned", "card")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values())
    assert json.loads((tmp_path / "pruned/config.json").read_text())["dtype"] == "bfloat16"
    assert torch.allclose(loaded(calibration).logits, pruned.model(calibration).logits, atol=1e-5)


def test_large_models_are_written_in_several_files(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = make_tiny("qwen2").model
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_shards(dict(model.named_parameters()), tmp_path, shard_bytes=40_000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    for name, stored in stored_tensors(tmp_path).items():
        assert torch.equal(stored.read(), model.get_parameter(name)), name


def test_spooled_weights_leave_no_files_behind(
    make_tiny: MakeTiny, calibration: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    streamed = streamed_from(make_tiny("tied").model, tmp_path / "dense")
    target = ParameterTarget(0.1, "total", streamed.params)
    (pruned,) = build_method("slicegpt").prune(streamed, calibration, [target], seed=0)
    assert len(list((tmp_path / "spool").glob("*/*.safetensors"))) == 8  # embedding, 2 x 3 sublayers, head
    del pruned
    gc.collect()  # hooks and layers know each other
    assert not list((tmp_path / "spool").iterdir())


def test_mobilellm_is_not_streamed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mobilellm"}')
    with pytest.raises(UserError, match="leave out --stream"):
        stream_checkpoint(tmp_path, torch.float32, "cpu")


def test_a_streamed_model_is_scored_as_one_in_memory(make_tiny: MakeTiny, tmp_path: Path) -> None:
    loaded = make_tiny("tied", torch.float32)
    streamed = streamed_from(loaded.model, tmp_path / "dense")
    sequences = [np.arange(1, 20) % 90, np.arange(3, 40) % 90]
    tails = [np.arange(5), np.arange(7)]
    ours, expected = (
        score_tails(m.model, m.model.get_output_embeddings(), sequences, tails, batch_tokens=16)
        for m in (streamed, loaded)
    )
    assert np.allclose(ours.loglikelihood, expected.loglikelihood, rtol=1e-5)
    assert (ours.greedy == expected.greedy).all()
