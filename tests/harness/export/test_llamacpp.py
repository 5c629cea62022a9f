"""llama.cpp computes what the models compute. `make gguf-check` installs it first, and shows the figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.flap import FLAP
from harness.calibration import draw_calibration
from harness.corpora import load_corpus
from harness.export import PRECISIONS, export_gguf
from harness.export.llamacpp import decode_speeds, llamacpp_logprobs, open_gguf, torch_logprobs
from harness.method import ParameterTarget
from harness.models import LoadedModel, assemble, remove_units
from harness.records import CalibrationSpec

pytestmark = pytest.mark.llamacpp
NOTHING = torch.tensor([], dtype=torch.int64)
TEXT = "It's 1984, isn't it?\n\n  Naïve café: 3,141 — déjà vu! 我想 🦙\tend of it"


@pytest.fixture(scope="module")
def windows(smollm2: LoadedModel) -> torch.Tensor:
    """Held-out text, [8, 128]."""
    text = "\n\n".join(load_corpus("heldout").passages[:10])
    return torch.tensor(smollm2.tokenizer.encode(text, add_special_tokens=False)[:1024]).view(8, 128)


@pytest.fixture(scope="module")
def models(smollm2: LoadedModel) -> dict[str, Any]:
    """Dense; pruned by FLAP to its own widths and biases in every layer; the same with empty parts in three layers."""
    tokens = draw_calibration(CalibrationSpec(num_samples=16), smollm2.tokenizer, 0).tokens
    flap = next(FLAP().prune(smollm2, tokens, [ParameterTarget(0.2, "total", smollm2.params)], 0)).model
    emptied = LoadedModel(model=flap, tokenizer=smollm2.tokenizer, weights_sha256="")
    empty = {"layers.0.attention": NOTHING, "layers.11.mlp": NOTHING,
             "layers.29.attention": NOTHING, "layers.29.mlp": NOTHING}  # fmt: skip
    return {"dense": smollm2.model, "flap": flap, "emptied": remove_units(flap, emptied.structure, empty)}


@pytest.mark.parametrize(
    ("precision", "typical", "largest"),
    # Nats a token. float32 with float32 keys and values differs by rounding alone; float16 has 11 bits in weights,
    # activations, keys and values. For Q8_0 llama.cpp rounds activations to 8 bits as well: PyTorch with both rounded
    # to the same blocks of 32 moves a token of this text by 0.072 on average and 0.67 at most.
    [("float32", 2e-4, 5e-3), ("float16", 5e-3, 0.1), ("q8_0", 0.1, 1.0)],
)
@pytest.mark.parametrize("which", ["dense", "flap", "emptied"])
def test_log_likelihoods_of_heldout_text_are_the_models(
    which: str, precision: str, typical: float, largest: float, models: dict[str, Any], smollm2: LoadedModel,
    windows: torch.Tensor, tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "model.gguf"
    exported = export_gguf(models[which], smollm2.tokenizer, out, name=which, precision=precision)
    ours = torch_logprobs(models[which], windows)
    theirs = llamacpp_logprobs(out, windows, float32_cache=precision == "float32")
    difference = (theirs - ours).abs()
    print(
        f"\n{which} {precision} ({exported.architecture}): nats a token ours {-ours.mean():.4f} theirs "
        f"{-theirs.mean():.4f}; difference mean {difference.mean():.2g} largest {difference.max():.2g}"
    )
    assert exported.architecture == ("llama" if which == "dense" else "deci")
    assert difference.mean() < typical
    assert difference.max() < largest
    assert abs(float(theirs.mean() - ours.mean())) < 0.01  # of the text as a whole, in every precision


def test_llamacpp_makes_the_same_token_ids(smollm2: LoadedModel, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    export_gguf(smollm2.model, smollm2.tokenizer, out, name="dense")
    llama = open_gguf(out, context=32, every_logit=False)
    passages = [TEXT, *load_corpus("heldout").passages[:50], smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True)]  # fmt: skip
    for passage in passages:
        assert llama.tokenize(passage.encode(), add_bos=True, special=True) == smollm2.tokenizer.encode(passage)
    assert llama.token_eos() == smollm2.tokenizer.eos_token_id


def test_llamacpp_makes_the_same_token_ids_by_sentencepiece(
    tiny_tokenizer: Callable[..., Any], make_tiny: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    tokenizer, loaded = tiny_tokenizer("sentencepiece"), make_tiny("grouped-query", torch.float32)
    state = dict(loaded.model.named_parameters())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.randn(300, 48)
    config = loaded.model.config
    config.vocab_size = 300
    out = tmp_path / "model.gguf"
    export_gguf(assemble(config, state), tokenizer, out, name="tiny")
    llama = open_gguf(out, context=32, every_logit=False)
    for text in ("the inn and the an", "an  inn\nthe é 我", "then"):
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text, add_special_tokens=False)


def test_decode_speed_is_measured_beside_the_dense_file(
    models: dict[str, Any], smollm2: LoadedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    for precision in PRECISIONS:
        paths = [tmp_path / f"{which}-{precision}.gguf" for which in models]
        for model, path in zip(models.values(), paths, strict=True):
            export_gguf(model, smollm2.tokenizer, path, name="timed", precision=precision)
        speeds = decode_speeds(paths, windows[0].tolist())
        for path, speed in zip(paths, speeds, strict=True):
            print(f"\n{path.stem}: {path.stat().st_size / 1e6:.1f} MB, {speed.tokens_per_second:.1f} tokens/s, "
                  f"{speed.ratio:.2f} x dense")  # fmt: skip
        assert speeds[0].ratio == 1
        assert all(speed.tokens_per_second > 0 for speed in speeds)
