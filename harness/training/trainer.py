"""The training loop: AdamW over packed text, step by step, with models that may shrink on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.records import TrainingSpec
from harness.structure import KeepPlan, ModelStructure, apply_plan
from harness.token_loss import Teacher, token_loss
from harness.training.data import Batch, PackedText
from harness.training.schedule import warmup_stable_decay

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two moments of every parameter, by torch's names."""


class TrainingDivergedError(UserError):
    """A loss was not finite."""


@dataclass(frozen=True)
class StepLog:
    """One step, for the log."""

    step: int
    """From 0."""
    tokens: int
    """Read in all steps so far, this one included."""
    loss: float
    """Mean cross-entropy of the step's scored tokens, in nats."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    seconds: float


class Trainer:
    """Trains one model over a course of steps that is known beforehand.

    Args:
        model: causal language model; its parameters learn (for LoRA: those that require gradients).
        text: what it reads; the order of windows follows from ``spec.seed`` and the step alone.
        spec: the settings.
        teacher: dense model to distil from; None trains on the text alone.
    """

    def __init__(self, model: Any, text: PackedText, spec: TrainingSpec, *, teacher: Any = None) -> None:
        self.text, self.spec, self.teacher = text, spec, teacher
        self.step = 0
        """Steps taken."""
        self._put(model)

    @property
    def total_steps(self) -> int:
        """Steps of the whole course: whole batches of the token budget, at least one."""
        return max(self.spec.tokens // self.spec.batch_tokens, 1)

    @property
    def windows_per_step(self) -> int:
        """Windows of one step, over all processes."""
        return max(self.spec.batch_tokens // self.text.context_length, 1)

    def advance(self, until: int, on_step: Callable[[StepLog], None] = lambda _log: None) -> None:
        """Take steps until ``until`` have been taken in all.

        Args:
            until: at most ``total_steps``.
            on_step: hears of every step.

        Raises:
            TrainingDivergedError: a loss is not finite; the model is left as that step found it.
        """
        self.model.train()
        while self.step < until:
            on_step(self._one_step())
        self.model.eval()

    def replace_model(self, model: Any, structure: ModelStructure, plan: KeepPlan, *, carry: bool = True) -> None:
        """Go on with a smaller model.

        Args:
            model: the trained one without the units that ``plan`` leaves out.
            structure: of the model so far.
            plan: units of it that are kept.
            carry: take AdamW's moments along, cut like the weights they belong to; else they start from zero.
        """
        before = self.optimizer_state() if carry else {}
        self._put(model)
        if carry:
            cut = {kind: dict(apply_plan(before[kind], structure, plan)) for kind in MOMENTS}
            self.load_optimizer_state({**before, **cut})

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """``exp_avg``, ``exp_avg_sq`` and ``step`` -> parameter name -> tensor; empty before the first step."""
        found: dict[str, dict[str, Any]] = {kind: {} for kind in (*MOMENTS, "step")}
        for name, parameter in self._learning():
            for kind, tensor in self.optimizer.state.get(parameter, {}).items():
                found[kind][name] = tensor
        return found

    def load_optimizer_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Take up moments: those of ``optimizer_state``, cut or not."""
        for name, parameter in self._learning():
            known = {kind: state[kind][name] for kind in (*MOMENTS, "step") if name in state.get(kind, {})}
            if known:
                self.optimizer.state[parameter] = known

    def _put(self, model: Any) -> None:
        self.model = model
        if self.spec.mode == "full":
            model.requires_grad_(True)
        if self.spec.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        learning = [parameter for _, parameter in self._learning()]
        self.optimizer = torch.optim.AdamW(learning, lr=self.spec.learning_rate, weight_decay=0.0, fused=True)

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        # Empty ones (of a layer that lost every head) have nothing to learn, and fused AdamW refuses them.
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad and p.numel())

    def _one_step(self) -> StepLog:
        start = time.perf_counter()
        rate = warmup_stable_decay(
            self.step, self.total_steps, self.spec.learning_rate, self.spec.min_learning_rate,
            warmup=self.spec.warmup, decay=self.spec.decay,
        )  # fmt: skip
        batch = self.text.batch(self.step * self.windows_per_step, self.windows_per_step, self.spec.seed)
        loss = self._backward(batch)
        if not math.isfinite(loss):
            self.optimizer.zero_grad()
            first = self.step * self.windows_per_step
            raise TrainingDivergedError(
                f"the loss of step {self.step} is {loss} at learning rate {rate:.3g}, on windows "
                f"{first}..{first + self.windows_per_step - 1} of the text; lower the learning rate"
            )
        learning = [parameter for _, parameter in self._learning()]
        norm = float(nn.utils.clip_grad_norm_(learning, self.spec.clip))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = self.step * self.windows_per_step * self.text.context_length
        return StepLog(self.step - 1, tokens, loss, rate, norm, time.perf_counter() - start)

    def _backward(self, batch: Batch) -> float:
        """Gradients of the batch's mean loss; its mean cross-entropy."""
        device = self.model.get_input_embeddings().weight.device
        num_scored = max(int(batch.scored_BT.sum()), 1)
        rows = max(self.spec.micro_batch_tokens // self.text.context_length, 1)
        total = 0.0
        for tokens, scored in zip(torch.split(batch.tokens_BT, rows), torch.split(batch.scored_BT, rows), strict=True):
            total += self._micro_batch(tokens.to(device), scored.to(device), num_scored)
        return total / num_scored

    def _micro_batch(self, tokens_BT: Tensor, scored_BT: Tensor, num_scored: int) -> float:
        """Gradients of some windows' share in the batch's loss; the sum of their cross-entropies."""
        narrow = self.spec.autocast == "bfloat16"
        predicting = scored_BT[:, 1:]

        def states(model: Any) -> Tensor:
            with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=narrow):
                hidden_BTH: Tensor = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
            return hidden_BTH[:, :-1][predicting].to(torch.bfloat16 if narrow else hidden_BTH.dtype)

        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                known_Nh = states(self.teacher)
            teacher = Teacher(known_Nh, self.teacher.lm_head.weight, self.spec.temperature, self.spec.distillation)
        hidden_NH = states(self.model)
        weight_N = torch.full((len(hidden_NH),), 1 / num_scored, dtype=torch.float64, device=hidden_NH.device)
        targets = tokens_BT[:, 1:][predicting]
        loss, plain = token_loss(hidden_NH, self.model.lm_head.weight, targets, weight_N, teacher)
        torch.autograd.backward(loss)
        return float(plain)
