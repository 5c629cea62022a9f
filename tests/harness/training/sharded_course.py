"""A course of training that is pruned and resumed on its way, by one process or several; run by test_sharding.py.

python sharded_course.py MODEL OUT
torchrun --nproc-per-node 2 sharded_course.py MODEL OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from harness.models import remove_units
from harness.records import TrainingSpec
from harness.structure import describe
from harness.training import PackedText, StepLog, Trainer

SPEC = TrainingSpec(tokens=640, context_length=16, batch_tokens=64, micro_batch_tokens=16, learning_rate=1e-2, clip=0.5)
PLAN = {"layers.0.mlp": torch.tensor([0, 5, 79]), "layers.1.attention": torch.tensor([], dtype=torch.int64)}


def main(folder: Path, out: Path) -> None:
    accelerator = Accelerator(cpu=True) if "WORLD_SIZE" in os.environ else None
    text = PackedText(np.random.default_rng(0).integers(0, 96, 800).astype(np.uint32), 16)
    log: list[StepLog] = []

    def trainer_of(model: Any) -> Trainer:
        return Trainer(model, text, SPEC, accelerator=accelerator, sharded=accelerator is not None)

    def pruned(model: Any) -> Any:
        return remove_units(model, describe(model), PLAN)

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    structure, small = describe(dense), pruned(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    trainer = trainer_of(dense)
    trainer.advance(3, log.append)
    trainer.replace_model(pruned(trainer.whole_model()), structure, PLAN)
    trainer.advance(6, log.append)
    weights, moments = trainer.learning_state(), trainer.optimizer_state()
    trainer = trainer_of(small)
    trainer.restore(6, weights, moments)
    trainer.advance(9, log.append)
    here = sum(getattr(p, "to_local", p.detach)().numel() for p in trainer.model.parameters())
    weights = {name: parameter.detach() for name, parameter in trainer.whole_model().named_parameters()}
    if accelerator is None or accelerator.is_main_process:
        save_file(weights, out.with_suffix(".safetensors"))
        told = {"losses": [e.loss for e in log], "norms": [e.gradient_norm for e in log], "parameters_here": here}
        out.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
