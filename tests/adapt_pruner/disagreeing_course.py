"""A course of Adapt-Accel whose processes look at other tokens; run by test_accel.py.

python disagreeing_course.py MODEL OUT 1                      # what the second would do alone
torchrun --nproc-per-node 2 disagreeing_course.py MODEL OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from adapt_pruner import AdaptAccel
from harness.budget import ParameterTarget
from harness.models import LoadedModel
from harness.records import TrainingSpec
from harness.training import PackedText, Session

SPEC = TrainingSpec(tokens=640, context_length=16, batch_tokens=64, learning_rate=1e-3)


def main(folder: Path, out: Path, *alone: str) -> None:
    accelerator = Accelerator(cpu=True) if "WORLD_SIZE" in os.environ else None
    rank = accelerator.process_index if accelerator else int(alone[0])
    text = PackedText(np.random.default_rng(0).integers(0, 96, 800).astype(np.uint32), 16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    loaded = LoadedModel(model=model, tokenizer=None, weights_sha256="tiny")
    calibration = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(rank))
    session = Session(SPEC, text, accelerator=accelerator)
    target = ParameterTarget(0.3, "total", loaded.params)
    answer = AdaptAccel(rounds=2).prune_and_train(loaded, calibration, target, 0, session)
    told = {
        "kept": {name: units.tolist() for name, units in answer.kept.items()},
        "losses": [entry.loss for entry in session.log],
    }
    out.with_name(f"{out.name}-{rank}").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
