"""Training a causal language model on packed text, so that it can be stopped, pruned between steps and gone on with."""

from harness.training.data import PackedText
from harness.training.trainer import StepLog, Trainer, TrainingDivergedError

__all__ = ["PackedText", "StepLog", "Trainer", "TrainingDivergedError"]
