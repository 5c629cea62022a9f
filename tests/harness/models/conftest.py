"""Tiny checkpoints as the hub has them, a tokenizer trained on the spot, and a Llama written out in plain torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

HEAD_DIM, GROUP = 8, 3

SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank, twice a day.",
    "Small language models run on phones; weight sharing makes them deeper at the same size.",
    "Pruning removes kv heads and channels that matter least.  Two spaces, and a tab:\tdone.",
    "Numbers such as 1234 and 5678, accents like naïve café, and symbols such as #, @ and %.",
)
VOCAB_SIZE = 384
"""Three control tokens, 256 bytes for the fallback, and what the trainer learns."""

CONFIG = {
    "architectures": ["MobileLLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
        "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "layer_sharing": False,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "mobilellm",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "share_embedding": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}

TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}

MakeMobileLLM = Callable[..., tuple[Path, dict[str, Tensor]]]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-fallback BPE model as Llama 2's and MobileLLM's are."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(SENTENCES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB_SIZE,
        model_type="bpe", byte_fallback=True, character_coverage=0.999, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture
def make_mobilellm(tmp_path: Path, sentencepiece_model: Path) -> MakeMobileLLM:
    """``make_mobilellm(**changes to the configuration)`` -> checkpoint folder and its tensors in float64."""

    def make(**changes: object) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path / "MobileLLM"
        folder.mkdir()
        config = {**CONFIG, **changes}
        state = random_state(config)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
        (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
        for name in ("configuration_mobilellm.py", "modeling_mobilellm.py"):
            (folder / name).write_text("raise AssertionError('code of the checkpoint was run')\n")
        save_file({name: tensor.float() for name, tensor in state.items()}, folder / "model.safetensors")
        return folder, state

    return make


def random_state(config: dict[str, object]) -> dict[str, Tensor]:
    """Tensors by their names on the hub, float64 but of float32's precision."""
    generator = torch.Generator().manual_seed(3)
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def normal(*shape: int, std: float = 0.15) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).double()

    def norm() -> Tensor:
        return (torch.rand(hidden, generator=generator) + 0.5).double()

    state = {"model.embed_tokens.weight": normal(vocab, hidden, std=0.5), "model.norm.weight": norm()}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        rows = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        rows["o_proj"] = (hidden, queries)
        state |= {f"{layer}.self_attn.{name}.weight": normal(*shape) for name, shape in rows.items()}
        rows = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
        state |= {f"{layer}.mlp.{name}.weight": normal(*shape) for name, shape in rows.items()}
        state |= {f"{layer}.{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
    if not config["share_embedding"]:
        state["lm_head.weight"] = normal(vocab, hidden)
    return state


def rotated(x_THD: Tensor, frequency_F: Tensor) -> Tensor:
    """Rotary embedding, the halves of a head rotated against each other."""
    half = HEAD_DIM // 2
    angle_TF = torch.arange(len(x_THD)).double()[:, None] * frequency_F
    cos, sin = angle_TF.cos()[:, None], angle_TF.sin()[:, None]
    first, second = x_THD[..., :half], x_THD[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def block(x_TC: Tensor, w: Callable[[str], Tensor], frequency_F: Tensor) -> Tensor:
    given = rms_norm(x_TC, w("input_layernorm"))
    q, k, v = ((given @ w(f"self_attn.{n}_proj").T).view(len(x_TC), -1, HEAD_DIM) for n in "qkv")
    q, k = rotated(q, frequency_F), rotated(k, frequency_F)
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // GROUP].T / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, head // GROUP])
    x_TC = x_TC + torch.cat(heads, dim=-1) @ w("self_attn.o_proj").T
    given = rms_norm(x_TC, w("post_attention_layernorm"))
    gate = given @ w("mlp.gate_proj").T
    return x_TC + (gate * gate.sigmoid() * (given @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T


def frequencies(base: float = 10000.0) -> Tensor:
    """Radians per token of each pair of channels."""
    half = HEAD_DIM // 2
    return 1 / base ** (torch.arange(half).double() / half)


@pytest.fixture
def plain_logits() -> Callable[..., Tensor]:
    """``plain_logits(state, tokens, applications=1, frequency_F=...)``: a three-layer Llama in plain torch, [T, V]."""

    def forward(
        state: dict[str, Tensor], tokens_T: Tensor, applications: int = 1, frequency_F: Tensor | None = None
    ) -> Tensor:
        frequency_F = frequencies() if frequency_F is None else frequency_F
        x_TC = state["model.embed_tokens.weight"][tokens_T]
        for i in range(3):
            for _ in range(applications):
                x_TC = block(x_TC, lambda name, i=i: state[f"model.layers.{i}.{name}.weight"], frequency_F)
        head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
        return rms_norm(x_TC, state["model.norm.weight"]) @ head.T

    return forward
