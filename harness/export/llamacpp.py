"""Runs GGUF files with llama-cpp-python, to compare what they compute and how fast with the models they came from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError

GGML_F32 = 0
GGML_F16 = 1


@dataclass(frozen=True)
class DecodeSpeed:
    """How fast a file generates, beside the first of the files it was measured with."""

    tokens_per_second: float
    """Median over the repeats."""
    ratio: float
    """Median over the repeats of its speed over the first file's in the same repeat."""


def open_gguf(path: Path, *, context: int, every_logit: bool, float32_cache: bool = False) -> Any:
    """A ``llama_cpp.Llama`` on as many threads as torch uses.

    Args:
        path: the file.
        context: tokens it will read at most; also read at once.
        every_logit: whether logits are kept at every position, not only at the last.
        float32_cache: keys and values in float32, where llama.cpp's default is float16.

    Raises:
        UserError: llama-cpp-python is not installed, or does not load the file.
    """
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise UserError("llama-cpp-python is not installed; type: pip install '.[gguf-check]' (it compiles)") from error
    cache = GGML_F32 if float32_cache else GGML_F16
    threads = torch.get_num_threads()
    try:
        return Llama(
            str(path), n_ctx=context, n_batch=context, n_ubatch=context, logits_all=every_logit, n_threads=threads,
            n_threads_batch=threads, type_k=cache, type_v=cache, verbose=False,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"llama.cpp does not load {path}: {error}") from error


def llamacpp_logprobs(path: Path, windows_BT: Tensor, *, float32_cache: bool = False) -> Tensor:
    """Log-probability that llama.cpp gives each token but the first of every row; float64 [B, T - 1].

    Raises:
        UserError: as ``open_gguf``.
    """
    length = windows_BT.shape[1]
    llama = open_gguf(path, context=length, every_logit=True, float32_cache=float32_cache)
    rows: list[Tensor] = []
    for window in windows_BT:
        llama.reset()
        llama.eval(window.tolist())
        logits = torch.from_numpy(llama.scores[: length - 1].copy()).double()
        rows.append(logits.log_softmax(-1).gather(1, window[1:, None]).squeeze(1))
    llama.close()
    return torch.stack(rows)


@torch.no_grad()
def torch_logprobs(model: Any, windows_BT: Tensor) -> Tensor:
    """The same from the model itself; float64 [B, T - 1]."""
    rows = [
        model(input_ids=window[None], use_cache=False)
        .logits[0, :-1]
        .double()
        .log_softmax(-1)
        .gather(1, window[1:, None])
        for window in windows_BT
    ]
    return torch.stack(rows).squeeze(-1)


def decode_speeds(
    paths: Sequence[Path], prompt: Sequence[int], *, num_tokens: int = 32, repeats: int = 5
) -> list[DecodeSpeed]:
    """Tokens per second at batch 1 after a prompt, the files taking turns in this process.

    Args:
        paths: the first is what the others are compared with.
        prompt: token ids read before the clock starts.
        num_tokens: generated in each repeat; which ones does not change the speed, so the prompt's are fed again.
        repeats: turns of each file; one more before them is not counted.
    """
    llamas = [open_gguf(path, context=len(prompt) + num_tokens, every_logit=False) for path in paths]
    seconds = [[_decode_seconds(llama, prompt, num_tokens) for llama in llamas] for _ in range(repeats + 1)][1:]
    for llama in llamas:
        llama.close()
    return [
        DecodeSpeed(
            tokens_per_second=num_tokens / statistics.median(turn[i] for turn in seconds),
            ratio=statistics.median(turn[0] / turn[i] for turn in seconds),
        )
        for i in range(len(paths))
    ]


def _decode_seconds(llama: Any, prompt: Sequence[int], num_tokens: int) -> float:
    llama.reset()
    llama.eval(list(prompt))
    start = time.perf_counter()
    for i in range(num_tokens):
        llama.eval([prompt[i % len(prompt)]])
    return time.perf_counter() - start
