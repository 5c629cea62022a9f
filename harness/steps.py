"""The two halves of a run as steps of their own: prune and save a model, evaluate a saved one; and export one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from harness.budget import ParameterTarget
from harness.calibration import draw_calibration
from harness.errors import UserError
from harness.export import Exported, export_gguf
from harness.method import PrunedModel
from harness.models import LoadedModel, load_model
from harness.models.loading import checkpoint_folder
from harness.models.saving import refuse_existing, save_model
from harness.records import Basis, CalibrationSpec, Dtype, EvaluationSpec, ModelRef, ParamCounts
from harness.registry import build_method
from harness.structure import count_parameters

if TYPE_CHECKING:
    from harness.evaluation.run import Evaluation


@dataclass(frozen=True)
class SavedModel:
    """What was written."""

    params_before: ParamCounts
    params_after: ParamCounts
    target_params: int
    class_name: str


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
) -> SavedModel:
    """Prune one model to one sparsity and save it as a folder.

    Raises:
        UserError: the method cannot prune this model that far, or the folder cannot be written.
    """
    refuse_existing(out)
    competitor = build_method(method, params)
    loaded = load_model(model, dtype, device)
    reason = competitor.why_unsupported(loaded.structure)
    if reason is not None:
        raise UserError(f"{method} does not support {model.name}: {reason}")
    target = ParameterTarget(sparsity, basis, loaded.params)
    pruned = PrunedModel(model=loaded.model)
    if sparsity > 0:
        longest = getattr(loaded.model.config, "max_position_embeddings", None)
        tokens = draw_calibration(calibration, loaded.tokenizer, seed, longest).tokens.to(device)
        pruned = next(competitor.prune(loaded, tokens, [target], seed))
    after = count_parameters(pruned.model.named_parameters())
    if not target.is_met_by(after, competitor.tolerance):
        raise UserError(f"{method} ended at {after.on(basis):,} {basis} parameters, the target being {target.params:,}")
    card = _card(model, method, competitor.model_dump(mode="json"), target, loaded, after, pruned)
    save_model(pruned.model, loaded.tokenizer, out, card)
    return SavedModel(loaded.params, after, target.params, type(pruned.model).__name__)


def evaluate_folder(model: ModelRef, spec: EvaluationSpec, dtype: Dtype, device: str, batch_tokens: int) -> Evaluation:
    """Score a saved model.

    Raises:
        UserError: it does not load.
    """
    from harness.evaluation.run import evaluate

    loaded = load_model(model, dtype, device)
    return evaluate(loaded.model, loaded.tokenizer, spec, batch_tokens=batch_tokens, progress=None)


def export_model(model: ModelRef, precision: str, out: Path) -> Exported:
    """Write a model, pruned or not, as a GGUF file.

    Raises:
        UserError: it does not load, llama.cpp cannot run it, or the file cannot be written.
    """
    refuse_existing(out)
    config = json.loads((checkpoint_folder(model) / "config.json").read_text())
    # Both hold every value of the checkpoint; float32 would only double the memory of a bfloat16 one.
    dtype: Dtype = "bfloat16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "float32"
    loaded = load_model(model, dtype)
    return export_gguf(loaded.model, loaded.tokenizer, out, name=Path(model.name).name, precision=precision)


def _card(
    model: ModelRef,
    method: str,
    params: dict[str, JsonValue],
    target: ParameterTarget,
    loaded: LoadedModel,
    after: ParamCounts,
    pruned: PrunedModel,
) -> str:
    settings = "\n".join(f"- {name}: {value}" for name, value in {**params, **pruned.knob}.items())
    total = 1 - after.total / loaded.params.total
    inner = 1 - (after.total - after.embedding) / (loaded.params.total - loaded.params.embedding)
    return f"""---
library_name: transformers
base_model: {model.name}
tags: [pruning, {method}]
---

# {model.name}, {target.sparsity:.0%} pruned with {method}

| | dense | pruned | removed |
|---|---:|---:|---:|
| all parameters | {loaded.params.total:,} | {after.total:,} | {total:.2%} |
| without embeddings | {loaded.params.on("non-embedding"):,} | {after.on("non-embedding"):,} | {inner:.2%} |

Dense weights: SHA-256 of the checkpoint's files `{loaded.weights_sha256}`.

Settings of {method}:

{settings}

Load with `AutoModelForCausalLM.from_pretrained(folder)` after `import harness.models`, or with
`trust_remote_code=True` where the harness is not installed (the folder then brings its own modelling file, if it
needs one).
"""
