"""Models rebuilt from tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

from harness.errors import UserError
from harness.models import LoadedModel, assemble, remove_units
from harness.models.saving import save_model
from harness.models.streaming import rebuilt, state_of
from harness.structure import count_parameters

MakeTiny = Callable[..., LoadedModel]
UNEVEN = {"layers.0.attention": torch.tensor([1]), "layers.1.mlp": torch.arange(5, 40)}


def test_the_same_tensors_give_the_stock_class_and_equal_logits(tiny: LoadedModel, calibration: torch.Tensor) -> None:
    again = assemble(tiny.model.config, dict(tiny.model.named_parameters()))
    assert type(again) is type(tiny.model)
    assert torch.equal(again(calibration).logits, tiny.model(calibration).logits)


def test_even_widths_give_the_stock_class(tiny: LoadedModel) -> None:
    plan = {group.name: torch.arange(group.layer, group.layer + 32) for group in tiny.structure.mlp}
    smaller = remove_units(tiny.model, tiny.structure, plan)
    assert type(smaller) is type(tiny.model)
    assert {layer.intermediate_size for layer in smaller.config.per_layer_config} == {32}


def test_untouched_tensors_are_shared_and_the_model_stays_as_it_was(
    tiny: LoadedModel, calibration: torch.Tensor
) -> None:
    before = tiny.model(calibration).logits
    smaller = remove_units(tiny.model, tiny.structure, UNEVEN)
    assert smaller.model.embed_tokens.weight.data_ptr() == tiny.model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(tiny.model(calibration).logits, before)


def test_pruned_model_survives_save_and_load(tiny: LoadedModel, calibration: torch.Tensor, tmp_path: Path) -> None:
    smaller = remove_units(tiny.model, tiny.structure, UNEVEN)
    save_model(smaller, None, tmp_path / "model", "card")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(calibration).logits, smaller(calibration).logits)
    assert count_parameters(loaded.named_parameters()) == count_parameters(smaller.named_parameters())
    assert loaded.config.tie_word_embeddings == tiny.model.config.tie_word_embeddings


def test_layer_without_heads_or_channels_returns_its_biases(
    make_tiny: MakeTiny, calibration: torch.Tensor, tmp_path: Path
) -> None:
    loaded = make_tiny("biased")
    nothing = torch.tensor([], dtype=torch.int64)
    smaller = remove_units(loaded.model, loaded.structure, {"layers.0.attention": nothing, "layers.0.mlp": nothing})
    layer = smaller.model.layers[0]
    constant = layer.self_attn.o_proj.bias + layer.mlp.down_proj.bias
    embedded = smaller.model.embed_tokens(calibration)
    rotary = smaller.model.rotary_emb(embedded, torch.arange(16)[None])
    assert torch.allclose(layer(embedded, position_embeddings=rotary), embedded + constant)
    save_model(smaller, None, tmp_path / "model", "card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(calibration).logits, smaller(calibration).logits)


@pytest.mark.parametrize("first_layer_loses_all_heads", [False, True])
def test_generation_with_a_cache_equals_generation_without(
    make_tiny: MakeTiny, calibration: torch.Tensor, first_layer_loses_all_heads: bool
) -> None:
    loaded = make_tiny("grouped-query")
    heads = torch.tensor([], dtype=torch.int64) if first_layer_loses_all_heads else torch.tensor([1])
    smaller = remove_units(loaded.model, loaded.structure, {**UNEVEN, "layers.0.attention": heads})
    prompt = calibration[:1, :5]
    cached = smaller.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = prompt
    for _ in range(8):
        ids = torch.cat([ids, smaller(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


def test_attention_implementation_reaches_every_layer(make_tiny: MakeTiny, calibration: torch.Tensor) -> None:
    loaded = make_tiny("grouped-query")
    smaller = remove_units(loaded.model, loaded.structure, UNEVEN)
    logits = smaller(calibration).logits
    smaller.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in smaller.model.layers} == {"eager"}
    assert torch.allclose(smaller(calibration).logits, logits, atol=1e-4)  # eager softmax is float32


def test_how_a_checkpoint_generates_is_kept_and_saved(make_tiny: MakeTiny, tmp_path: Path) -> None:
    loaded = make_tiny("grouped-query")
    loaded.model.generation_config.update(eos_token_id=[2, 7], temperature=0.6)  # without do_sample, as some are
    smaller = rebuilt(loaded.model, state_of(loaded.model))
    save_model(smaller, None, tmp_path / "model", "card")
    again = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (again.eos_token_id, again.temperature) == ([2, 7], 0.6)


def test_an_existing_folder_is_not_overwritten(make_tiny: MakeTiny, tmp_path: Path) -> None:
    loaded = make_tiny("tied")
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        save_model(loaded.model, None, tmp_path, "card")
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_a_killed_save_leaves_nothing_that_loads(make_tiny: MakeTiny, tmp_path: Path) -> None:
    loaded = make_tiny("tied")

    class Interrupted:
        def save_pretrained(self, _folder: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_model(loaded.model, Interrupted(), tmp_path / "model", "card")
    assert list(tmp_path.iterdir()) == []


def test_another_family_is_refused_by_name() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10)
    with pytest.raises(UserError, match="'gpt2' cannot be rebuilt"):
        assemble(config, dict(GPT2LMHeadModel(config).named_parameters()))
