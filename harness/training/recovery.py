"""Training a pruned model back: every weight, or low-rank updates that are merged into the weights afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.errors import UserError
from harness.models.streaming import streamed
from harness.records import TrainingSpec
from harness.training.session import Session


def recover(model: Any, session: Session) -> None:
    """Train a model in place over the whole course of a session, from its last checkpoint on where it has one.

    Args:
        model: causal language model; its tensors may be shared with others, which stay as they are.
        session: settings, text, checkpoints; ``spec.mode`` says what learns.

    Raises:
        UserError: the model is streamed.
        TrainingDivergedError: a loss is not finite.

    Source: low-rank updates of all linear maps as in LLM-Pruner (arXiv:2305.11627), section 3.3 (rank 8, no dropout).
    """
    own_parameters(model)
    with low_rank(model, session.spec):
        trainer = session.trainer(model, session.checkpoint())
        session.advance(trainer, trainer.total_steps, {})
    model.requires_grad_(False)


def own_parameters(model: Any) -> None:
    """Copy every parameter, so that training changes no other model that shares them.

    Raises:
        UserError: the weights are in files.
    """
    if streamed(model) is not None:
        raise UserError("a streamed model cannot be trained; leave out --stream or take a machine with more memory")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@contextmanager
def low_rank(model: Any, spec: TrainingSpec) -> Iterator[None]:
    """Within it low-rank updates of every linear map but the head learn, and nothing else; then they are merged.

    Nothing happens where ``spec.mode`` is not ``lora``.
    """
    if spec.mode != "lora":
        yield
        return
    from peft import LoraConfig, get_peft_model

    targets = [name for name, module in model.named_modules() if _adaptable(name, module)]
    config = LoraConfig(r=spec.lora_rank, lora_alpha=spec.lora_alpha, lora_dropout=0.0, target_modules=targets)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        wrapped = get_peft_model(model, config)
    try:
        yield
    finally:
        wrapped.merge_and_unload()


def _adaptable(name: str, module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and name != "lm_head" and module.weight.numel() > 0
