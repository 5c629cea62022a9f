"""Llama 3 checkpoints: scaled rotary embeddings, tied and untied heads, shards, and the hub's gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import UserError
from harness.models import load_model, remove_units
from harness.models.loading import read_model
from harness.records import ModelRef

PlainLogits = Callable[..., Tensor]
MakeMobileLLM = Callable[..., tuple[Path, dict[str, Tensor]]]

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
"""Llama 3.1's scaling, for a context short enough to matter in 16 tokens."""


def llama3_frequencies(head_dim: int = 8, base: float = 500.0) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    scaled = []
    for i in range(head_dim // 2):
        frequency = base ** (-2 * i / head_dim)
        rounds = LLAMA3["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        share = min(max((rounds - low) / (high - low), 0.0), 1.0)
        scaled.append(share * frequency + (1 - share) * frequency / LLAMA3["factor"])
    return torch.tensor(scaled, dtype=torch.float64)


@pytest.fixture
def make_llama3(make_mobilellm: MakeMobileLLM) -> Callable[[bool], tuple[Path, dict[str, Tensor]]]:
    """``make_llama3(tied)``: a checkpoint in three shards, its configuration in the words of 2024."""

    def make(tied: bool) -> tuple[Path, dict[str, Tensor]]:
        folder, state = make_mobilellm(share_embedding=tied)
        config = json.loads((folder / "config.json").read_text())
        for key in ("auto_map", "share_embedding", "layer_sharing"):
            del config[key]
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
        config |= {"rope_theta": 500.0, "rope_scaling": LLAMA3, "max_position_embeddings": 128}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").unlink()
        names = sorted(state)
        files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: state[name].float() for name in names if files[name] == file}, folder / file)
        index = {"metadata": {"total_size": sum(t.numel() * 4 for t in state.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder, state

    return make


@pytest.mark.parametrize("tied", [True, False])
def test_scaled_rotary_embeddings_and_shards_give_the_logits_of_a_plain_forward(
    make_llama3: Callable[[bool], tuple[Path, dict[str, Tensor]]],
    plain_logits: PlainLogits,
    calibration: Tensor,
    tied: bool,
) -> None:
    folder, state = make_llama3(tied)
    model = read_model(folder, torch.float64)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for tokens, logits in zip(calibration, model(calibration).logits, strict=True):
        expected = plain_logits(state, tokens, frequency_F=llama3_frequencies())
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(logits, plain_logits(state, tokens), atol=1e-2)


def test_a_pruned_model_keeps_the_scaling(
    make_llama3: Callable[[bool], tuple[Path, dict[str, Tensor]]], plain_logits: PlainLogits, calibration: Tensor
) -> None:
    folder, state = make_llama3(True)
    loaded = load_model(ModelRef(name=str(folder)))
    loaded.model.double()
    kept = torch.arange(4, 80)
    smaller = remove_units(loaded.model, loaded.structure, {"layers.2.mlp": kept})
    for name in ("gate_proj", "up_proj"):
        state[f"model.layers.2.mlp.{name}.weight"] = state[f"model.layers.2.mlp.{name}.weight"][kept]
    state["model.layers.2.mlp.down_proj.weight"] = state["model.layers.2.mlp.down_proj.weight"][:, kept]
    expected = plain_logits(state, calibration[0], frequency_F=llama3_frequencies())
    torch.testing.assert_close(smaller(calibration[:1]).logits[0], expected, atol=2e-4, rtol=1e-4)


class Gate(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated repository to somebody who has not been let in."""

    def do_HEAD(self) -> None:
        self.refuse()

    def do_GET(self) -> None:
        self.refuse()

    def refuse(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this model is restricted. You must be authenticated.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def gated_hub() -> Iterator[str]:
    """Address of a hub that lets nobody in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_gated_model_says_how_to_get_in(gated_hub: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": gated_hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    arguments = ["evaluate", "llama-3.1-8b", "--tasks", "arc_easy"]
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip() == (
        "harness: meta-llama/Llama-3.1-8B is gated: accept its licence at "
        "https://huggingface.co/meta-llama/Llama-3.1-8B, log in with `hf auth login`, and run the same command again; "
        "or pass the folder of a copy"
    )


def test_a_missing_shard_is_named(make_llama3: Callable[[bool], tuple[Path, dict[str, Tensor]]]) -> None:
    folder, _ = make_llama3(False)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00003.safetensors \(1 of 3 weight files are missing\)"):
        load_model(ModelRef(name=str(folder)))
