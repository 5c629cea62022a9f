"""Measures what pruning a large checkpoint takes: time and peak memory of `harness prune --stream`, method by method.

    python benchmarks/memory.py --shape llama-3.2-1b                            # all methods
    python benchmarks/memory.py --shape llama-3.1-8b --methods flap --keep DIR  # one, on a checkpoint that stays
    python benchmarks/memory.py --shape llama-3.2-1b --resident                 # weights in memory, for comparison

The checkpoint has random bfloat16 weights in the exact shape, in shards as the hub has them, and the embedded model's
tokenizer. Every method runs as its own process, from the command line to the saved folder; peak is that process's
largest resident set (mapped pages of weight files counted). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from harness.method import InterleavedMethod
from harness.models.assemble import without_weights
from harness.models.catalog import CATALOG
from harness.models.checkpoint import INDEX, parameter_shapes
from harness.models.embedded import embedded_checkpoint
from harness.registry import known_methods, method_class

ROPE: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"factor": 8.0},
    "llama-3.2-1b": {"factor": 32.0},
}
"""Their rotary scaling beyond what both share."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
AFFORDABLE = {"adapt-pruner": ["samples_per_step=2"]}
"""Adapt-Pruner runs forward and backward in every step, some ten of them."""


def make_checkpoint(folder: Path, shape: str) -> None:
    """Random weights in the shape of a catalog model: a file per layer, and one for embedding, norm and head."""
    values = CATALOG[shape].shape.config_values()
    rope = {"rope_parameters": LLAMA3_ROPE | ROPE[shape]} if shape in ROPE else {}
    config = LlamaConfig(**values, **rope, max_position_embeddings=131_072, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in parameter_shapes(without_weights(config)).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        parts.setdefault(f"model-{part}.safetensors", {})[name] = size
    generator = torch.Generator().manual_seed(0)
    for file, sizes in parts.items():
        tensors = {
            name: torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            if len(size) > 1
            else torch.ones(size, dtype=torch.bfloat16)
            for name, size in sizes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": {n: file for file, sizes in parts.items() for n in sizes}}
    (folder / INDEX).write_text(json.dumps(index))
    for path in embedded_checkpoint().glob("*token*"):
        shutil.copy(path, folder)
    config.save_pretrained(folder)


def prune(method: str, checkpoint: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds, peak resident bytes and counted parameters of one `harness prune`."""
    settings = options.set.get(method, AFFORDABLE.get(method, []))
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        out = Path(scratch) / "pruned"
        command = [sys.executable, "-m", "harness.cli", "prune", "--method", method, "--model", str(checkpoint),
                   "--sparsity", str(options.sparsity), "--out", str(out), "--results", str(Path(scratch) / "none"),
                   "--calibration-samples", str(options.samples), "--calibration-length", str(options.length),
                   "--dtype", options.dtype]  # fmt: skip
        command += [] if options.resident else ["--stream"]
        command += [part for setting in settings for part in ("--set", setting)]
        start = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": scratch})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"{method} ended with status {os.waitstatus_to_exitcode(status)}")
        stored = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return {"seconds": round(seconds, 1), "peak_bytes": usage.ru_maxrss * 1024, "pruned_bytes": stored}


def pruning_methods() -> list[str]:
    """Those that remove something, and train nothing while they do."""
    classes = {name: method_class(name) for name in known_methods() if name != "dense"}
    return [name for name, cls in classes.items() if not issubclass(cls, InterleavedMethod)]


def settings(text: str) -> tuple[str, str]:
    """``adapt-pruner.max_steps=20`` -> its method, and the rest."""
    method, _, rest = text.partition(".")
    return method, rest


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=[n for n, e in CATALOG.items() if e.hub_id])
    parser.add_argument("--methods", default="all")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument("--dtype", default="float32", help="that layers compute in")
    parser.add_argument("--set", action="append", type=settings, default=[], help="a setting, method.name=value")
    parser.add_argument("--resident", action="store_true", help="keep the weights in memory")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoint; used again where it is there")
    options = parser.parse_args()
    options.set = {method: [rest for m, rest in options.set if m == method] for method, _ in options.set}
    methods = pruning_methods() if options.methods == "all" else options.methods.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / options.shape
        if not folder.exists():
            # In a process of its own: a child's peak is never below the peak of the process that started it.
            maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(folder, options.shape))
            maker.start()
            maker.join()
            if maker.exitcode:
                raise SystemExit("the checkpoint could not be made")
        weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{options.shape}: {weight_bytes:,} bytes of weights; {options.samples} x {options.length} tokens")
        found = {}
        for method in methods:
            found[method] = one = {**prune(method, folder, options), "weight_bytes": weight_bytes}
            print(
                f"{method:14} {one['seconds']:8.1f} s  peak {one['peak_bytes'] / 1e9:6.2f} GB "
                f"({one['peak_bytes'] / weight_bytes:.2f} of the weights)  saved {one['pruned_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
