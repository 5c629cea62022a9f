"""The training loop: AdamW over packed text, step by step, with models that may shrink on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.cpu import fast_cpu
from harness.errors import UserError
from harness.models.assemble import assemble
from harness.records import TrainingSpec
from harness.structure import KeepPlan, ModelStructure, apply_plan
from harness.training.data import Batch, PackedText
from harness.training.loss import TrainingLoss
from harness.training.schedule import warmup_stable_decay
from harness.training.sharding import gathered, shard, spread_like, whole

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
        accelerator: accelerate's, where several processes share every step; None for one.
        sharded: let each of them hold a part of weights, gradients and moments, rather than all.

    Raises:
        UserError: the processes cannot share a step evenly.
    """

    def __init__(
        self,
        model: Any,
        text: PackedText,
        spec: TrainingSpec,
        *,
        teacher: Any = None,
        accelerator: Any = None,
        sharded: bool = False,
    ) -> None:
        self.text, self.spec, self.teacher, self.accelerator = text, spec, teacher, accelerator
        self.sharded = sharded
        self.step = 0
        """Steps taken."""
        _, processes = self._place
        if self.windows_per_step % processes:
            raise UserError(
                f"a step of {spec.batch_tokens} tokens is {self.windows_per_step} windows of {text.context_length}, "
                f"which {processes} processes cannot share evenly; give batch tokens that are a multiple of "
                f"{processes * text.context_length}"
            )
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
        with fast_cpu():
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
        """``exp_avg``, ``exp_avg_sq`` and ``step`` -> parameter name -> tensor; empty before the first step.

        Where the model is sharded every process must ask.
        """
        found: dict[str, dict[str, Any]] = {kind: {} for kind in (*MOMENTS, "step")}
        for name, parameter in self._learning():
            for kind, tensor in self.optimizer.state.get(parameter, {}).items():
                found[kind][name] = gathered(tensor)
        return found

    def load_optimizer_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Take up moments: those of ``optimizer_state``, cut or not."""
        for name, parameter in self._learning():
            known = {kind: of_kind[name] for kind, of_kind in state.items() if name in of_kind}
            if known:
                self.optimizer.state[parameter] = {
                    kind: spread_like(tensor, parameter) for kind, tensor in known.items()
                }

    def learning_state(self) -> dict[str, Tensor]:
        """Name -> value of every parameter that learns; where the model is sharded every process must ask."""
        return {name: gathered(parameter.detach()) for name, parameter in self._learning()}

    def whole_model(self) -> Any:
        """The model as it is now, in one piece in every process; every process must ask."""
        if not self.sharded:
            return self.model
        model = assemble(self.model.config, {name: whole(p.detach()) for name, p in self.model.named_parameters()})
        model.generation_config = self.model.generation_config
        return model

    def restore(self, step: int, weights: Mapping[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> None:
        """Go on from where another trainer of such a model was.

        Args:
            step: steps taken.
            weights: its ``learning_state``.
            moments: its ``optimizer_state``.
        """
        self.step = step
        with torch.no_grad():
            for name, parameter in self._learning():
                parameter.copy_(spread_like(weights[name], parameter))
        self.load_optimizer_state(moments)

    def _put(self, model: Any) -> None:
        self.model = model
        if self.spec.mode == "full":
            model.requires_grad_(True)
        for parameter in model.parameters():
            # Of a layer that lost every head: nothing to learn, and fused AdamW refuses it.
            parameter.requires_grad_(parameter.requires_grad and parameter.numel() > 0)
        if self.spec.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss: Any = TrainingLoss(model, self.spec, self.teacher)
        if self.sharded:
            shard(loss, model)
        learning = [parameter for _, parameter in self._learning()]
        optimizer: Any = torch.optim.AdamW(learning, lr=self.spec.learning_rate, weight_decay=0.0, fused=True)
        if self.accelerator is not None and not self.sharded:
            loss, optimizer = self.accelerator.prepare(loss, optimizer)
        self._loss, self.optimizer = loss, optimizer

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)

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
        norm = self._clipped()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = self.step * self.windows_per_step * self.text.context_length
        return StepLog(self.step - 1, tokens, loss, rate, norm, time.perf_counter() - start)

    def _clipped(self) -> float:
        """The norm of all gradients, which are no longer than ``spec.clip`` from here on."""
        learning = [parameter for _, parameter in self._learning()]
        is_torchs = self.accelerator is None or self.sharded
        clip = nn.utils.clip_grad_norm_ if is_torchs else self.accelerator.clip_grad_norm_
        return float(whole(clip(learning, self.spec.clip)))

    def _backward(self, batch: Batch) -> float:
        """Gradients of the batch's mean loss, its windows shared among the processes; its mean cross-entropy."""
        device = self.model.get_input_embeddings().weight.device
        rank, processes = self._place
        num_scored = max(int(batch.scored_BT.sum()), 1)
        rows = max(self.spec.micro_batch_tokens // self.text.context_length, 1)
        tokens, scored = (torch.split(t[rank::processes].to(device), rows) for t in (batch.tokens_BT, batch.scored_BT))
        total = torch.zeros((), dtype=torch.float64, device=device)
        for i, (tokens_BT, scored_BT) in enumerate(zip(tokens, scored, strict=True)):
            with self._gathering(last=i == len(tokens) - 1):
                # Gradients are averaged over processes, whose sum is wanted.
                loss, plain = self._loss(tokens_BT, scored_BT, processes / num_scored)
                torch.autograd.backward(loss)
            total += plain
        if self.accelerator is not None:
            total = self.accelerator.reduce(total, "sum")
        return float(total) / num_scored

    @property
    def _place(self) -> tuple[int, int]:
        """This process's number, and how many there are."""
        if self.accelerator is None:
            return 0, 1
        return self.accelerator.process_index, self.accelerator.num_processes

    def _gathering(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients go over the wire once a step, with its last micro-batch."""
        if self.sharded:
            self._loss.set_requires_gradient_sync(last)
            return nullcontext()
        if self.accelerator is None or last:
            return nullcontext()
        quiet: AbstractContextManager[None] = self.accelerator.no_sync(self._loss)
        return quiet
