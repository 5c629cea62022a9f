"""Training a causal language model on packed text, so that it can be stopped, pruned between steps and gone on with."""

from harness.training.data import PackedText
from harness.training.recovery import own_parameters, recover
from harness.training.session import Session
from harness.training.trainer import StepLog, Trainer, TrainingDivergedError

__all__ = ["PackedText", "Session", "StepLog", "Trainer", "TrainingDivergedError", "own_parameters", "recover"]
