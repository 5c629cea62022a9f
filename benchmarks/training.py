"""Times our training loop against transformers' Trainer: same model, windows, batch, optimizer and dtype, in turns.

    python benchmarks/training.py                          # the embedded model, 5 turns of each
    python benchmarks/training.py --model pruned/ --steps 4 --context-length 1024

A turn is a few steps on windows of the same text; medians over turns count, and the first turn of each side does not.
Memory is the growth of the resident set while a side runs, sampled. The last line is one JSON object with ``ratio``
(our tokens per second over theirs).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scoring import CLOCKS, Run, measured
from torch.utils.data import Dataset
from transformers import Trainer as StockTrainer
from transformers import TrainingArguments

from harness.evaluation.quiet import quiet
from harness.models import load_model
from harness.records import TrainingSpec
from harness.request import model_ref
from harness.training import PackedText, Session
from harness.training.text import training_text


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The text as transformers' Trainer wants it: labels are the tokens, which the model shifts."""

    def __init__(self, text: PackedText, steps: int, rows: int) -> None:
        self.tokens_BT = text.batch(0, steps * rows, seed=0).tokens_BT

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens_BT[index], "labels": self.tokens_BT[index]}


def stock(model: Any, text: PackedText, spec: TrainingSpec, steps: int) -> Callable[[], float]:
    """What runs some steps of transformers' Trainer; the last loss."""
    rows = spec.batch_tokens // spec.context_length
    at_once = max(spec.micro_batch_tokens // spec.context_length, 1)
    model.requires_grad_(True)

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=at_once,
                gradient_accumulation_steps=rows // at_once, learning_rate=spec.learning_rate,
                lr_scheduler_type="constant", optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=spec.clip,
                report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
                gradient_checkpointing=spec.gradient_checkpointing, dataloader_num_workers=0,
            )  # fmt: skip
            trainer = StockTrainer(model, arguments, train_dataset=Windows(text, steps, rows))
            return float(trainer.train().training_loss)

    return run


def ours(model: Any, text: PackedText, spec: TrainingSpec, steps: int) -> Callable[[], float]:
    """What runs some steps of our loop; the last loss."""
    session = Session(spec, text)
    trainer = session.trainer(model)

    def run() -> float:
        session.advance(trainer, trainer.step + steps, {})
        return session.log[-1].loss

    return run


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--turns", type=int, default=5, help="of each side, after one that does not count")
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = TrainingSpec(
        tokens=options.batch_tokens * options.steps * (options.turns + 1), context_length=options.context_length,
        batch_tokens=options.batch_tokens, micro_batch_tokens=options.micro_batch_tokens,
        gradient_checkpointing=options.gradient_checkpointing,
    )  # fmt: skip
    with quiet(), tempfile.TemporaryDirectory() as cache:
        loaded = load_model(model_ref(options.model))
        text = training_text(spec, loaded.tokenizer, Path(cache))
        sides = {
            "trainer": stock(copy.deepcopy(loaded.model), text, spec, options.steps),
            "ours": ours(copy.deepcopy(loaded.model), text, spec, options.steps),
        }
        found: dict[str, list[Run]] = {name: [] for name in sides}
        for _ in range(options.turns + 1):
            for name, run in sides.items():
                with measured(CLOCKS["wall"]) as side:
                    run()
                found[name].append(side)
    tokens = options.steps * options.batch_tokens
    speed = {name: tokens / statistics.median(turn.seconds for turn in turns[1:]) for name, turns in found.items()}
    print(f"{options.model}, {options.batch_tokens} tokens a step, windows of {options.context_length}, float32")
    for name, turns in found.items():
        seconds = [round(turn.seconds, 2) for turn in turns[1:]]
        memory = max(turn.grown_bytes for turn in turns) / 1e6
        print(f"{name:8} {speed[name]:8.1f} tokens/s   turns {seconds} s   grown {memory:,.0f} MB")
    pairs = zip(found["trainer"][1:], found["ours"][1:], strict=True)
    spread = [round(theirs.seconds / own.seconds, 3) for theirs, own in pairs]
    print(f"turn by turn: {spread}")
    print(
        json.dumps({"ratio": round(speed["ours"] / speed["trainer"], 4), **{k: round(v, 1) for k, v in speed.items()}})
    )


if __name__ == "__main__":
    main()
