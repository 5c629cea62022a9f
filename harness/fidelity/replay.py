"""Repeats a published run, or a run at matched size, with ours, and says what came out and what it cost."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from pydantic import JsonValue

from harness.budget import ParameterTarget
from harness.efficiency import measured
from harness.errors import UserError
from harness.evaluation.quiet import quiet
from harness.fidelity.golden import Golden
from harness.method import PrunedModel, ReimplementedMethod
from harness.models import LoadedModel, assemble, load_model
from harness.models.catalog import DEFAULT_MODEL
from harness.published import PublishedCase
from harness.records import ModelRef
from harness.registry import build_method
from harness.structure import count_parameters


@dataclass(frozen=True, slots=True)
class Outcome:
    """One pruned model, measured."""

    params: int
    loss: float
    """Mean next-token loss on the held-out tokens, in nats."""
    kept: Mapping[str, frozenset[int]] | None
    """Group name -> units of the dense model that are left; None where no units were removed."""
    seconds: float
    """Of pruning alone."""
    peak_bytes: int
    """Peak resident memory of the process while pruning, the loaded model included."""


def replay(case: PublishedCase, golden: Golden) -> Outcome:
    """Prune as a published case did."""
    loaded = load_dense(case.multi_head)
    method = reimplemented(case.method, settings_of(case))
    with measured() as cost:
        pruned = method.prune_at(loaded, golden.calibration(case.calibration), case.knob, seed=0)
    return _outcome(pruned, golden, cost.seconds, cost.peak_bytes)


def prune_to(
    name: str, params: Mapping[str, JsonValue], sparsity: float, shape: tuple[int, int], golden: Golden
) -> Outcome:
    """Prune to a sparsity of all parameters on the first ``shape`` (rows, columns) of the calibration tokens."""
    loaded = load_dense()
    target = ParameterTarget(sparsity, "total", loaded.params)
    with measured() as cost:
        pruned = next(reimplemented(name, params).prune(loaded, golden.calibration(shape), [target], 0))
    return _outcome(pruned, golden, cost.seconds, cost.peak_bytes)


def load_dense(multi_head: bool = False) -> LoadedModel:
    """The embedded model, or its multi-head expansion, read into memory: what is timed afterwards loads nothing."""
    with quiet():
        loaded = load_model(ModelRef(name=DEFAULT_MODEL))
    if multi_head:
        loaded = multi_head_expansion(loaded)
    for parameter in loaded.model.parameters():
        parameter.sum()  # the files are mapped, and read when they are first used
    return loaded


def in_fresh_process(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own, so that its peak memory and its warm-up are its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def reimplemented(name: str, params: Mapping[str, JsonValue]) -> ReimplementedMethod:
    """A method with a published implementation.

    Raises:
        UserError: the method has none.
    """
    method = build_method(name, dict(params))
    if not isinstance(method, ReimplementedMethod):
        raise UserError(f"{name} has no published implementation that it could be held against")
    return method


def settings_of(case: PublishedCase) -> dict[str, JsonValue]:
    """The fidelity mode of a case: the method's published settings, and the case's own."""
    return {**reimplemented(case.method, {}).published, **case.params}


def multi_head_expansion(loaded: LoadedModel) -> LoadedModel:
    """The same function with every kv head repeated for each of its query heads."""
    config = copy.deepcopy(loaded.model.config)
    repeats, size = loaded.structure.query_group_size, loaded.structure.head_dim
    config.num_key_value_heads = config.num_attention_heads
    state = {
        name: weight.unflatten(0, (-1, size)).repeat_interleave(repeats, 0).flatten(0, 1)
        if "k_proj" in name or "v_proj" in name
        else weight
        for name, weight in loaded.model.named_parameters()
    }
    return LoadedModel(assemble(config, state), loaded.tokenizer, f"{loaded.weights_sha256} multi-head")


@torch.inference_mode()
def heldout_loss(model: Any, golden: Golden) -> float:
    """Mean over the held-out batches of their mean next-token loss, in nats, as the published figures were taken."""
    losses = [float(model(rows, labels=rows).loss) for rows in golden.heldout_batches()]
    return sum(losses) / len(losses)


def _outcome(pruned: PrunedModel, golden: Golden, seconds: float, peak_bytes: int) -> Outcome:
    kept = None
    if pruned.kept is not None:
        kept = {name: frozenset(units.tolist()) for name, units in pruned.kept.items()}
    return Outcome(
        params=count_parameters(pruned.model.named_parameters()).total,
        loss=heldout_loss(pruned.model, golden),
        kept=kept,
        seconds=seconds,
        peak_bytes=peak_bytes,
    )
