"""What a run is (RunSpec) and what it gave (RunRecord): the file format of ``results/``. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.dataclasses import dataclass

FORMAT_VERSION: Literal[1] = 1
_NOWHERE = ""
"""What no field of a file is called."""

Basis = Literal["total", "non-embedding"]
Dtype = Literal["float32", "bfloat16"]
Status = Literal["ok", "unsupported", "failed"]


class Frozen(BaseModel):
    """A value object: equal by content, never changed, refusing fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ModelRef(Frozen):
    """Which checkpoint a run starts from."""

    name: str
    """Catalog name, hub id or local folder."""
    revision: str | None = None
    """Hub commit, where the checkpoint comes from the hub."""


class CalibrationSpec(Frozen):
    """Which tokens the methods score with."""

    source: str = "wikipedia"
    """Embedded text (``wikipedia``, ``books``), a hub corpus (``c4``, ``wikitext2``, ...) or a .txt/.jsonl path."""
    num_samples: Annotated[int, Field(ge=1)] = 64
    """Sequences drawn."""
    num_tokens: Annotated[int, Field(ge=2)] = 128
    """Tokens in each sequence."""
    sha256: str | None = None
    """Of the file, where the text is one."""


class TaskFile(Frozen):
    """A user's own task: a YAML file of lm-eval's format."""

    name: str
    """What the file calls the task."""
    path: str
    """Absolute."""
    sha256: str
    """Of the file and of what it names: included files, modules of its functions, local data files."""


class EvaluationSpec(Frozen):
    """Which documents are scored, and how."""

    tasks: tuple[str, ...]
    """lm-eval task names, groups such as ``mmlu`` included, in the order of the table."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Documents per task; None is all of them. Chosen by ``document_seed``, the same for every method."""
    mmlu_limit: Annotated[int, Field(ge=1)] | None = None
    """Documents per MMLU subject; None is all of them."""
    mmlu_num_fewshot: Annotated[int, Field(ge=0, le=5)] = 5
    """Worked examples before each MMLU question."""
    document_seed: int = 1234
    """Chooses the documents when there is a limit."""
    heldout_tokens: Annotated[int, Field(ge=0)] = 16384
    """Tokens of held-out text for perplexity; 0 measures none."""
    heldout_length: Annotated[int, Field(ge=2)] = 512
    """Tokens per window of held-out text."""
    data: Literal["embedded", "hub"] = "embedded"
    """Where the task documents come from."""
    task_files: tuple[TaskFile, ...] | None = None
    """Of those ``tasks`` that are a user's own; their documents come from where the files say."""


class EfficiencySpec(Frozen):
    """At which lengths running a model is counted and timed."""

    batch_size: Annotated[int, Field(ge=1)] = 1
    """Sequences generated at once."""
    prompt_tokens: Annotated[int, Field(ge=1)] = 64
    """Tokens read before the first new one."""
    new_tokens: Annotated[int, Field(ge=1)] = 4
    """Tokens generated one by one after the first."""
    repeats: Annotated[int, Field(ge=1)] = 5
    """Turns of each model behind a median; one more is not counted."""


class TrainingSpec(Frozen):
    """How a model is trained, after pruning or between its steps; the same for every method of a comparison."""

    tokens: Annotated[int, Field(ge=1)]
    """Read in all."""
    mode: Literal["full", "lora"] = "full"
    """Train every weight, or low-rank updates of every linear map that are merged afterwards."""
    source: str = "reading"
    """Text: names of ``harness texts`` joined by ``+``, or a .txt / .jsonl path."""
    context_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a window."""
    batch_tokens: Annotated[int, Field(ge=2)] = 4096
    """Tokens of one step, over all devices."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 2048
    """Tokens run at once on one device (at least one window); bounds memory."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Of the plateau."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Of the last step."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of the steps over which the rate rises."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of the steps over which it falls."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Type of the matrix products, where it is not the weights'."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third more time for a fraction of the memory."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the divergence from the dense model in the loss."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of both distributions in that divergence."""
    heldout_points: Annotated[int, Field(ge=0)] = 0
    """Times on the way, the end included, at which the loss on held-out text is measured, for a figure."""
    lora_rank: Annotated[int, Field(ge=1)] = 8
    """Rank of the updates in ``lora`` mode."""
    lora_alpha: Annotated[int, Field(ge=1)] = 16
    """Their scale is ``lora_alpha / lora_rank``."""
    seed: int = 0
    """Order of the windows, and the first low-rank updates."""


class RunSpec(Frozen):
    """Everything that can change a number, and nothing else (so no batch size, device or thread count)."""

    model: ModelRef
    method: str
    """Name in the registry, such as ``flap``."""
    method_params: dict[str, JsonValue] = {}
    """Every hyper-parameter of the method, defaults included."""
    sparsity: Annotated[float, Field(ge=0, lt=1)]
    """Fraction of the dense model's parameters to remove."""
    basis: Basis = "total"
    """Of which parameters ``sparsity`` is a fraction."""
    seed: int = 0
    """Draws the calibration sequences and every random choice of the method."""
    dtype: Dtype = "float32"
    """Of the weights while pruning and scoring."""
    calibration: CalibrationSpec | None
    """None for methods that look at no data."""
    round_to: Annotated[int, Field(ge=2)] | None = None
    """MLP widths are multiples of this; None leaves them free."""
    uniform: Literal[True] | None = None
    """All layers have one width and one number of kv heads; None leaves them free."""
    evaluation: EvaluationSpec
    efficiency: EfficiencySpec | None = None
    """None measures none."""
    recovery: TrainingSpec | None = None
    """How the model is trained after pruning, or between its steps; None trains it not at all."""

    @cached_property
    def run_id(self) -> str:
        """Readable slug and content hash, such as ``smollm2-135m--flap--s0.20--7693c52dec``."""
        # Without what is None, so that a setting that later versions add leaves the ids of older runs as they are.
        values = self.model_dump(mode="json", exclude_none=True)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:10]
        model = "".join(c if c.isalnum() or c in ".-_" else "-" for c in self.model.name.rsplit("/", 1)[-1])
        model = model.lstrip(".")  # a hidden folder is one that is being written
        return f"{model}--{self.method}--s{self.sparsity:.2f}--{digest}"

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> RunSpec:
        """As pydantic makes it, but a changed copy has an id of its own."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("run_id", None)
        return copied


class ParamCounts(Frozen):
    """Parameters counted from the weights; a tensor used twice counts once."""

    total: int
    embedding: int
    """Token embedding and output head."""
    attention: int
    """q, k, v and o projections with their biases."""
    mlp: int
    """gate, up and down projections with their biases."""
    extra: int
    """The rest: norms, SliceGPT's shortcut matrices."""

    def on(self, basis: Basis) -> int:
        """Parameters that ``basis`` speaks of."""
        return self.total if basis == "total" else self.total - self.embedding


class LayerWidths(Frozen):
    """What is left of one decoder layer."""

    num_key_value_heads: int
    intermediate_size: int


@dataclass(slots=True, kw_only=True, config=Frozen.model_config)
class Measure:
    """One number of the evaluation.

    A dataclass, since a grid has hundreds of thousands of them: records take a third of the memory that they take with
    models.
    """

    name: str
    """``<task>/<metric>``, such as ``arc_easy/acc_norm`` or ``heldout/ppl_token``."""
    value: float
    unit: str
    """``fraction``, ``perplexity``, ``nats/token``, ..."""
    higher_is_better: bool
    stderr: float | None = None
    """Standard error over documents, where there is one."""
    num_examples: int | None = None
    """Documents (or tokens, for a perplexity) behind the value."""
    chance: float | None = None
    """What guessing scores on these documents, for accuracies."""


class Provenance(Frozen):
    """Where a number comes from."""

    harness_version: str
    commit: str | None
    """Git commit of the harness, with ``+dirty`` where the tree had changes; None outside a checkout."""
    packages: dict[str, str]
    """Versions of what can change a number."""
    weights_sha256: str
    """Of the dense checkpoint."""
    calibration_sha256: str | None
    """Of the calibration token ids (int64, row-major); None where the method looks at no data."""
    data_fingerprints: dict[str, str]
    """Task or corpus -> hash of the documents that were scored."""
    device: str
    num_threads: int
    matmul: Literal["torch", "onednn"] = "torch"
    """The library that float32 products ran on: what PyTorch calls, or oneDNN where that was faster."""
    started_utc: str
    """ISO 8601."""


class RunRecord(Frozen):
    """One run, whatever became of it."""

    format_version: Literal[1] = FORMAT_VERSION
    spec: RunSpec
    status: Status
    reason: str | None = None
    """Why the run is ``unsupported`` or ``failed``, in a sentence."""
    traceback: str | None = None
    """Of a failed run."""
    params_before: ParamCounts | None = None
    params_after: ParamCounts | None = None
    tied_embeddings: bool | None = None
    """Whether the embedding and the head of the pruned model are one tensor."""
    knob: dict[str, float] = {}
    """The method's own setting that met the target, such as SliceGPT's ``slicing_ratio``."""
    layers: tuple[LayerWidths, ...] = ()
    trace: dict[str, JsonValue] = {}
    """What the method tells about its way there, such as layer importances per iteration."""
    measures: tuple[Measure, ...] = ()
    phase_seconds: dict[str, float] = {}
    """Wall time of ``load``, ``prune``, ``train``, ``evaluate`` and ``efficiency``."""
    peak_bytes: dict[str, int] = {}
    """Peak resident memory of the process while pruning, training and evaluating."""
    notes: tuple[str, ...] = ()
    """What a reader of the table must know: truncated contexts, calibration on an evaluated domain, ..."""
    provenance: Provenance | None = None

    def measure(self, name: str) -> Measure | None:
        """The measure called ``name``, or None where it was not taken."""
        for measure in self.measures:  # half as long as a generator takes, and tables ask a hundred thousand times
            if measure.name == name:
                return measure
        return None


class RunSummary(RunRecord):
    """A record read without what tells of a run's way: those fields are empty, and neither checked nor kept in memory.

    Fields at the top that this harness does not know are passed over too.
    """

    model_config = ConfigDict(extra="ignore")

    traceback: str | None = Field(default=None, validation_alias=_NOWHERE)
    layers: tuple[LayerWidths, ...] = Field(default=(), validation_alias=_NOWHERE)
    trace: dict[str, JsonValue] = Field(default={}, validation_alias=_NOWHERE)
