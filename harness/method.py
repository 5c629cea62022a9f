"""What a pruning method is given and must return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, JsonValue
from torch import Tensor

from harness.budget import ParameterTarget
from harness.footprint import Footprint
from harness.models import LoadedModel
from harness.structure import KeepPlan, ModelStructure
from harness.training.session import Session

__all__ = [
    "Footprint",
    "InterleavedMethod",
    "LoadedModel",
    "ParameterTarget",
    "PrunedModel",
    "PruningMethod",
    "ReimplementedMethod",
]


@dataclass(frozen=True)
class PrunedModel:
    """One smaller model, ready to run, save and train."""

    model: Any
    """A transformers causal language model whose configuration agrees with its weights."""
    knob: Mapping[str, float] = field(default_factory=dict)
    """The method's own settings that met the target, such as ``{"slicing_ratio": 0.458}``."""
    trace: Mapping[str, JsonValue] = field(default_factory=dict)
    """What the method tells about its way there; JSON, shown in reports."""
    kept: KeepPlan | None = None
    """Units of the dense model that are left; None where the method removes something else than units."""


class PruningMethod(BaseModel, ABC):
    """A competitor: its fields are its hyper-parameters, their defaults the paper's."""

    # A field's docstring is its meaning in `harness methods NAME`.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    """Spelling on the command line and in tables."""
    paper: ClassVar[str]
    """Where the method was published, such as ``arXiv:2312.11983``."""
    needs_calibration: ClassVar[bool] = True
    """Whether calibration tokens can change the result."""
    needs_seed: ClassVar[bool] = True
    """Whether the seed can: through calibration drawn with it, or through random choices of the method's own."""
    tolerance: ClassVar[float] = 0.0005
    """How far above its target a model may end, as a fraction of the dense parameters."""

    def why_unsupported(self, structure: ModelStructure) -> str | None:
        """Why this method cannot prune such a model, in a sentence; None where it can."""
        return None

    def working_bytes(self, footprint: Footprint) -> int:
        """Most memory held beside the dense weights while pruning, estimated from shapes; a pruned copy at the least.

        Args:
            footprint: the dense model's sizes and those of the calibration batch.
        """
        return footprint.copy_bytes

    @abstractmethod
    def prune(
        self, loaded: LoadedModel, calibration: Tensor, targets: Sequence[ParameterTarget], seed: int
    ) -> Iterator[PrunedModel]:
        """One smaller model per target, in one pass.

        The caller evaluates what was yielded before it asks for the next one, so an iterative method goes on pruning
        and a one-shot method reuses its statistics. Targets of sparsity 0 never reach a method: the caller answers
        them with the model as it was. A method leaves ``loaded.model`` as it found it.

        Args:
            loaded: the dense model, its tokenizer and its structure.
            calibration: token ids, int64 [num_samples, num_tokens], without padding.
            targets: by rising sparsity.
            seed: for every random choice.

        Raises:
            UnreachableSparsityError: the model has less to give than a target asks.
        """


class ReimplementedMethod(PruningMethod):
    """A method that others published with code of their own, which ours can be held against (``harness verify``)."""

    published: ClassVar[Mapping[str, JsonValue]]
    """Fidelity mode: the settings, where they are not the defaults, under which the published code's result comes out;
    each of them is a departure of ours, explained under ``Differs:``."""
    variants: ClassVar[tuple[Mapping[str, JsonValue], ...]]
    """Settings whose effect on size, units and loss ``harness verify`` measures beside the defaults: every departure,
    and choices that the paper leaves open."""

    @abstractmethod
    def prune_at(self, loaded: LoadedModel, calibration: Tensor, knob: float, seed: int) -> PrunedModel:
        """One model at the published code's own knob, wherever that ends in parameters.

        Args:
            loaded: the dense model.
            calibration: token ids, int64 [num_samples, num_tokens].
            knob: the ratio that the published code is called with, in (0, 1).
            seed: for every random choice.
        """


class InterleavedMethod(PruningMethod):
    """A method that trains between its pruning steps, where the others are trained after the last one.

    ``prune`` is the same course without the training.
    """

    @abstractmethod
    def prune_and_train(
        self, loaded: LoadedModel, calibration: Tensor, target: ParameterTarget, seed: int, session: Session
    ) -> PrunedModel:
        """One smaller, trained model; goes on from the session's checkpoint where it has one.

        Args:
            loaded: the dense model, left as it is.
            calibration: token ids, int64 [num_samples, num_tokens], without padding.
            target: where the last round ends.
            seed: for every random choice of the pruning.
            session: trains; its settings say on how many tokens in all.

        Raises:
            UnreachableSparsityError: the model has less to give than the target asks.
            TrainingDivergedError: a loss is not finite.
        """
