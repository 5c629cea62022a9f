"""MobileLLM checkpoints in the hub's layout, against a forward pass written out in plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from baselines.flap import FLAP
from harness.budget import ParameterTarget
from harness.cost import CostRequest
from harness.errors import UserError
from harness.evaluation.cost import scoring_cost
from harness.models import LoadedModel, load_model, remove_units
from harness.models.saving import save_model
from harness.records import EvaluationSpec, ModelRef
from harness.registry import build_method
from harness.structure import count_parameters, describe

PlainLogits = Callable[..., Tensor]
MakeMobileLLM = Callable[..., tuple[Path, dict[str, Tensor]]]
SHAPES = pytest.mark.parametrize("shape", [{}, {"layer_sharing": True}, {"share_embedding": False}], ids=str)


def loaded_in_float64(folder: Path) -> LoadedModel:
    loaded = load_model(ModelRef(name=str(folder)))
    loaded.model.double()
    return loaded


@SHAPES
def test_logits_equal_those_of_a_plain_forward(
    make_mobilellm: MakeMobileLLM, plain_logits: PlainLogits, calibration: Tensor, shape: dict[str, bool]
) -> None:
    folder, state = make_mobilellm(**shape)
    model = loaded_in_float64(folder).model
    applications = 2 if shape.get("layer_sharing") else 1
    for tokens, logits in zip(calibration, model(calibration).logits, strict=True):
        # Stock rotary embeddings and norms compute in float32.
        torch.testing.assert_close(logits, plain_logits(state, tokens, applications=applications), atol=2e-4, rtol=1e-4)


@SHAPES
def test_parameters_are_those_stored_and_the_head_is_tied_as_declared(
    make_mobilellm: MakeMobileLLM, shape: dict[str, bool]
) -> None:
    folder, state = make_mobilellm(**shape)
    loaded = load_model(ModelRef(name=str(folder)))
    assert loaded.params.total == sum(tensor.numel() for tensor in state.values())
    assert loaded.model.config.tie_word_embeddings == shape.get("share_embedding", True)
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == shape.get("share_embedding", True)
    expected = "PrunedLlamaForCausalLM" if shape.get("layer_sharing") else "LlamaForCausalLM"
    assert type(loaded.model).__name__ == expected


@pytest.mark.parametrize("saved_again", [False, True])
def test_tokenizer_gives_the_ids_of_sentencepiece(
    make_mobilellm: MakeMobileLLM, tmp_path: Path, saved_again: bool
) -> None:
    folder, _ = make_mobilellm()
    tokenizer = load_model(ModelRef(name=str(folder))).tokenizer
    if saved_again:
        tokenizer.save_pretrained(tmp_path / "saved")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    for text in ("The fox runs.", "naïve 12345 — 漢字 \t tab", "  two  spaces ", "line\nbreak", " x", "a", ""):
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
        assert tokenizer.decode(reference.encode(text)) == text


def test_shared_block_is_one_set_of_units(make_mobilellm: MakeMobileLLM) -> None:
    folder, _ = make_mobilellm(layer_sharing=True)
    structure = load_model(ModelRef(name=str(folder))).structure
    assert (structure.num_layers, structure.layer_repeats) == (3, 2)
    assert [(g.name, g.num_units) for g in structure.groups[:2]] == [("layers.0.attention", 2), ("layers.0.mlp", 80)]
    assert len(structure.groups) == 6
    # q and o 24 x 48 each, k and v 8 x 48 each; gate, up and down 48 each: what one block holds, not two.
    assert {g.unit_params for g in structure.attention} == {2 * 24 * 48 + 2 * 8 * 48}
    assert {g.unit_params for g in structure.mlp} == {3 * 48}


def test_removing_a_unit_of_a_shared_block_removes_it_from_both_applications(
    make_mobilellm: MakeMobileLLM, plain_logits: PlainLogits, calibration: Tensor, tmp_path: Path
) -> None:
    folder, state = make_mobilellm(layer_sharing=True)
    loaded = loaded_in_float64(folder)
    kept = torch.cat([torch.arange(11), torch.arange(13, 80)])
    smaller = remove_units(
        loaded.model, loaded.structure, {"layers.1.mlp": kept, "layers.2.attention": torch.tensor([1])}
    )
    for name in ("gate_proj", "up_proj"):
        state[f"model.layers.1.mlp.{name}.weight"] = state[f"model.layers.1.mlp.{name}.weight"][kept]
    state["model.layers.1.mlp.down_proj.weight"] = state["model.layers.1.mlp.down_proj.weight"][:, kept]
    attention = "model.layers.2.self_attn"
    for name, rows in {"q": 24, "k": 8, "v": 8}.items():
        state[f"{attention}.{name}_proj.weight"] = state[f"{attention}.{name}_proj.weight"][rows:]
    state[f"{attention}.o_proj.weight"] = state[f"{attention}.o_proj.weight"][:, 24:]
    for tokens, logits in zip(calibration, smaller(calibration).logits, strict=True):
        torch.testing.assert_close(logits, plain_logits(state, tokens, applications=2), atol=2e-4, rtol=1e-4)
    removed = 2 * 3 * 48 + 2 * 24 * 48 + 2 * 8 * 48
    assert count_parameters(smaller.named_parameters()).total == loaded.params.total - removed
    save_model(smaller, None, tmp_path / "pruned", "card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(again(calibration).logits, smaller(calibration).logits)
    assert describe(again) == describe(smaller)


@pytest.mark.parametrize("name", ["random", "magnitude", "flap"])
def test_methods_meet_their_target_on_shared_blocks(
    make_tiny: Callable[..., LoadedModel], calibration: Tensor, tmp_path: Path, name: str
) -> None:
    loaded = make_tiny("shared-layers")
    target = ParameterTarget(0.15, "total", loaded.params)
    pruned = next(build_method(name).prune(loaded, calibration, [target], seed=0)).model
    assert 0 <= target.excess(count_parameters(pruned.named_parameters())) < 3 * 48 + 2
    save_model(pruned, None, tmp_path / "pruned", "card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(again(calibration).logits, pruned(calibration).logits)


def test_flap_puts_back_the_mean_over_both_applications(
    make_tiny: Callable[..., LoadedModel], calibration: Tensor
) -> None:
    loaded = make_tiny("shared-layers")
    down_proj = loaded.model.model.layers[1].mlp.down_proj
    seen: list[Tensor] = []
    with torch.no_grad():
        hook = down_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
        loaded.model(calibration)
        hook.remove()
    flap = FLAP()
    statistics = flap.statistics(loaded, calibration)
    pruned = flap.compress(loaded, {"layers.1.mlp": torch.arange(1, 80)}, statistics)
    expected = down_proj.weight[:, 0] * torch.cat(seen)[:, 0].mean()
    torch.testing.assert_close(pruned.model.layers[1].mlp.down_proj.bias, expected)


def test_slicegpt_says_why_it_cannot_slice_shared_blocks(make_tiny: Callable[..., LoadedModel]) -> None:
    reason = build_method("slicegpt").why_unsupported(make_tiny("shared-layers").structure)
    assert reason is not None
    assert "applied 2 times with the same weights" in reason


def test_every_application_has_keys_and_values_of_its_own(make_mobilellm: MakeMobileLLM, calibration: Tensor) -> None:
    folder, _ = make_mobilellm(layer_sharing=True)
    model = loaded_in_float64(folder).model
    prompt = calibration[:2, :5]
    cached = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = prompt
    for _ in range(8):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


def test_a_stored_head_that_differs_from_the_shared_embedding_is_refused(make_mobilellm: MakeMobileLLM) -> None:
    folder, state = make_mobilellm()
    head = {"lm_head.weight": torch.ones_like(state["model.embed_tokens.weight"])}
    save_file({name: tensor.float() for name, tensor in (state | head).items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="ties the embeddings, but a head that differs is stored"):
        load_model(ModelRef(name=str(folder)))


def test_keys_that_the_configuration_leaves_out_mean_the_125m_model(make_mobilellm: MakeMobileLLM) -> None:
    from harness.models.mobilellm import llama_config

    config = llama_config({"model_type": "mobilellm"})
    assert (config.hidden_size, config.num_hidden_layers, config.rms_norm_eps) == (576, 30, 1e-5)
    assert config.tie_word_embeddings
    folder, _ = make_mobilellm()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_key_value_heads": 4}))
    with pytest.raises(UserError, match="6 query heads for 4 kv heads"):
        load_model(ModelRef(name=str(folder)))


@SHAPES
def test_what_scoring_will_cost_is_known_beforehand(make_mobilellm: MakeMobileLLM, shape: dict[str, bool]) -> None:
    folder, state = make_mobilellm(**shape)
    spec = EvaluationSpec(tasks=("arc_easy",), limit=2, heldout_tokens=64)
    cost = scoring_cost(CostRequest(model=ModelRef(name=str(folder)), dtype="float32", evaluation=spec))
    assert cost.params.total == sum(tensor.numel() for tensor in state.values())
    assert cost.num_tokens > 0
    assert cost.seconds_per_token > 0
