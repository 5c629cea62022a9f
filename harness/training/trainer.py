"""The training loop: AdamW over packed text, step by step, on one device or several, with models that may shrink."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.records import TrainingSpec
from harness.structure import KeepPlan, ModelStructure, apply_plan
from harness.training.data import Batch, PackedText
from harness.training.loss import Teacher, token_loss
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
        accelerator: accelerate's, where several processes train together; None is this process alone.
    """

    def __init__(
        self, model: Any, text: PackedText, spec: TrainingSpec, *, teacher: Any = None, accelerator: Any = None
    ) -> None:
        self.text, self.spec, self.teacher, self.accelerator = text, spec, teacher, accelerator
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
        self._loss: nn.Module = _BatchLoss(model, self.spec)
        if self.accelerator is not None:
            self._loss = self.accelerator.prepare_model(self._loss)

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
        """Gradients of the batch's mean loss, this process's part of it; the mean cross-entropy over all of it."""
        processes = 1 if self.accelerator is None else self.accelerator.num_processes
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        device = self.model.get_input_embeddings().weight.device
        num_scored = max(int(batch.scored_BT.sum()), 1)
        tokens, scored = (t[rank::processes].to(device) for t in (batch.tokens_BT, batch.scored_BT))
        rows = max(self.spec.micro_batch_tokens // self.text.context_length, 1)
        parts = list(zip(torch.split(tokens, rows), torch.split(scored, rows), strict=True))
        total = torch.zeros((), dtype=torch.float64, device=device)
        for i, (some, counted) in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if self.accelerator is None or last else self.accelerator.no_sync(self._loss):
                # Gradients are averaged over processes, so each counts its tokens that many times.
                loss, plain = self._loss(some, counted, processes / num_scored, self._teacher_states(some))
                loss.backward()
            total += plain.detach()
        if self.accelerator is not None:
            total = self.accelerator.reduce(total, "sum")
        return float(total) / processes

    def _teacher_states(self, tokens_BT: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        with torch.no_grad():
            states: Tensor = self.teacher.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        self._loss_module.head_of_teacher = self.teacher.lm_head.weight
        return states

    @property
    def _loss_module(self) -> Any:
        return self._loss if self.accelerator is None else self.accelerator.unwrap_model(self._loss)


class _BatchLoss(nn.Module):
    """A model and its loss as one module, so that several processes can share the backward pass."""

    def __init__(self, model: Any, spec: TrainingSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.head_of_teacher: Tensor | None = None

    def forward(
        self, tokens_BT: Tensor, scored_BT: Tensor, weight: float, teacher_BTh: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the token losses, and of their cross-entropies."""
        narrow = self.spec.autocast == "bfloat16"
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=narrow):
            hidden_BTH = self.model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        predicting = scored_BT[:, 1:]
        hidden_NH = hidden_BTH[:, :-1][predicting].to(torch.bfloat16 if narrow else hidden_BTH.dtype)
        weight_N = torch.full((len(hidden_NH),), weight, device=hidden_NH.device)
        teacher = None
        if teacher_BTh is not None:
            assert self.head_of_teacher is not None
            teacher = Teacher(
                teacher_BTh[:, :-1][predicting], self.head_of_teacher, self.spec.temperature, self.spec.distillation
            )
        return token_loss(hidden_NH, self.model.lm_head.weight, tokens_BT[:, 1:][predicting], weight_N, teacher)
