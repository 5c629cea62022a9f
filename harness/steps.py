"""The two halves of a run as steps of their own: prune and save a model, evaluate a saved one; and export one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import JsonValue

from harness.budget import target_for
from harness.calibration import draw_calibration
from harness.card import Origin, Outcome, matching, model_card
from harness.cost import CostRequest, describe_cost
from harness.cpu import fast_matmul, lean_cpu
from harness.errors import UserError
from harness.export import Exported, export_gguf
from harness.method import PrunedModel
from harness.models import load_model
from harness.models.saving import require_new, save_model
from harness.models.source import checkpoint_folder
from harness.records import Basis, CalibrationSpec, Dtype, EvaluationSpec, ModelRef, ParamCounts
from harness.registry import build_method
from harness.store import Store
from harness.structure import count_parameters, describe, layer_widths

if TYPE_CHECKING:
    from harness.evaluation.run import Evaluation


@dataclass(frozen=True)
class SavedModel:
    """What was written."""

    params_before: ParamCounts
    params_after: ParamCounts
    target_params: int
    class_name: str


def _usable(given: object, method: str) -> PrunedModel:
    """What a method gave, a plugin's included.

    Raises:
        UserError: it is no model, or its weights are not finite.
    """
    if not isinstance(given, PrunedModel):
        raise UserError(f"{method} gave no PrunedModel for the target; see docs/adding-a-method.md")
    broken = [name for name, p in given.model.named_parameters() if not (p.is_meta or torch.isfinite(p).all())]
    if broken:
        raise UserError(f"{method} left weights that are not finite, {broken[0]} first; nothing was saved")
    return given


def prune_and_save(
    *,
    model: ModelRef,
    method: str,
    params: dict[str, JsonValue],
    sparsity: float,
    basis: Basis,
    seed: int,
    calibration: CalibrationSpec,
    dtype: Dtype,
    device: str,
    out: Path,
    results: Path,
    round_to: int | None = None,
    uniform: bool | None = None,
    stream: bool = False,
) -> SavedModel:
    """Prune one model to one sparsity and save it as a folder, its card with the scores that ``results`` has of it.

    Raises:
        UserError: the method cannot prune this model that far, or the folder cannot be written.
    """
    require_new(out)
    on_record = list(Store(results).records())
    competitor = build_method(method, params)
    loaded = load_model(model, dtype, device, stream=stream)
    reason = competitor.why_unsupported(loaded.structure)
    if reason is not None:
        raise UserError(f"{method} does not support {model.name}: {reason}")
    target = target_for(sparsity, basis, loaded.params, loaded.structure, round_to, uniform)
    pruned = PrunedModel(model=loaded.model)
    if sparsity > 0:
        longest = getattr(loaded.model.config, "max_position_embeddings", None)
        tokens = draw_calibration(calibration, loaded.tokenizer, seed, longest).tokens.to(device)
        with lean_cpu() if stream else fast_matmul():
            pruned = _usable(next(competitor.prune(loaded, tokens, [target], seed), None), method)
    after = count_parameters(pruned.model.named_parameters())
    if not target.is_met_by(after, competitor.tolerance):
        raise UserError(f"{method} ended at {after.on(basis):,} {basis} parameters, the target being {target.params:,}")
    used = calibration if competitor.needs_calibration else None
    asked = competitor.model_dump(mode="json")
    origin = Origin(
        model, method, asked, target, seed if competitor.needs_seed else 0, dtype, used, loaded.weights_sha256
    )
    outcome = outcome_of(pruned, after)
    card = model_card(origin, outcome, matching(on_record, origin, outcome))
    save_model(pruned.model, loaded.tokenizer, out, card)
    return SavedModel(loaded.params, after, target.params, outcome.class_name)


def evaluate_folder(
    model: ModelRef,
    spec: EvaluationSpec,
    dtype: Dtype,
    device: str,
    batch_tokens: int,
    reference: ModelRef | None = None,
    *,
    stream: bool = False,
) -> Evaluation:
    """Score a saved model.

    Args:
        model: the model.
        spec: what is scored.
        dtype: of the weights.
        device: where they run.
        batch_tokens: tokens run at once.
        reference: the model to measure the divergence from; None measures none.
        stream: leave layers in their files until they run.

    Raises:
        UserError: a model does not load, or the reference has another vocabulary.
    """
    from harness.evaluation.reference import Dense
    from harness.evaluation.run import evaluate

    loaded = load_model(model, dtype, device, stream=stream)
    dense = None
    if reference is not None:
        other = load_model(reference, dtype, device, stream=stream)
        if other.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise UserError(
                f"{reference.name} and {model.name} have different vocabularies: there is no divergence between them; "
                "pass the model that was pruned as --reference"
            )
        dense = Dense(other.model, other.weights_sha256)
    return evaluate(loaded.model, loaded.tokenizer, spec, batch_tokens=batch_tokens, dense=dense)


def scoring_cost_of(model: ModelRef, spec: EvaluationSpec, dtype: Dtype, device: str, batch_tokens: int) -> str:
    """In a sentence, what scoring a model will cost.

    Raises:
        UserError: a model, tasks or data that cannot be reached.
    """
    from harness.evaluation.cost import scoring_cost

    request = CostRequest(model=model, dtype=dtype, evaluation=spec, device=device, batch_tokens=batch_tokens)
    return describe_cost(model.name, scoring_cost(request), [(0.0, "total")])


def export_model(model: ModelRef, precision: str, out: Path) -> Exported:
    """Write a model, pruned or not, as a GGUF file.

    Raises:
        UserError: it does not load, llama.cpp cannot run it, or the file cannot be written.
    """
    require_new(out)
    config = json.loads((checkpoint_folder(model) / "config.json").read_text())
    # Both hold every value of the checkpoint; float32 would only double the memory of a bfloat16 one.
    dtype: Dtype = "bfloat16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "float32"
    loaded = load_model(model, dtype)
    return export_gguf(loaded.model, loaded.tokenizer, out, name=Path(model.name).name, precision=precision)


def outcome_of(pruned: PrunedModel, params: ParamCounts) -> Outcome:
    """What pruning gave, for the card."""
    return Outcome(
        params=params,
        layers=layer_widths(describe(pruned.model)),
        knob=dict(pruned.knob),
        class_name=type(pruned.model).__name__,
        tied=bool(pruned.model.config.tie_word_embeddings),
    )
