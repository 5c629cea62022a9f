"""Every published case and every departure, run with our implementation: what `harness verify` tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from harness.fidelity.golden import Golden
from harness.fidelity.replay import Outcome, in_fresh_process, load_dense, prune_to, reimplemented, replay, settings_of
from harness.models.loading import fast_dtype
from harness.published import PublishedCase

MATCHED_SPARSITY = 0.2
"""Of all parameters: where departures are measured against our defaults."""
MIN_OVERLAP = 0.995
"""Of the published kept units that ours must keep too; the golden tests hold the rest to be near ties."""

Kept = Mapping[str, frozenset[int]]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Kept units that two models share, of those that the second keeps."""

    shared: int
    of: int

    @classmethod
    def between(cls, ours: Kept, theirs: Kept, kind: str) -> Overlap:
        """Over the groups of one kind (``attention`` or ``mlp``) that both name; a group left out was kept whole."""
        names = [name for name in theirs if name in ours and name.endswith(kind)]
        return cls(sum(len(ours[n] & theirs[n]) for n in names), sum(len(theirs[n]) for n in names))

    @property
    def share(self) -> float:
        """As a fraction; 1 where there was nothing to share."""
        return self.shared / self.of if self.of else 1.0


@dataclass(frozen=True, slots=True)
class CaseResult:
    """A published run and ours under the same settings on the same tokens."""

    case: PublishedCase
    settings: Mapping[str, JsonValue]
    ours: Outcome

    def overlap(self, kind: str) -> Overlap | None:
        """Of the kept units; None where no units were removed."""
        if self.case.figures.kept is None or self.ours.kept is None:
            return None
        return Overlap.between(self.ours.kept, self.case.figures.kept, kind)

    @property
    def disagreements(self) -> tuple[str, ...]:
        """What is not the published result, in words."""
        theirs, found = self.case.figures, []
        if self.ours.params != theirs.params:
            found.append(f"{self.ours.params:,} parameters, published {theirs.params:,}")
        if not abs(self.ours.loss - theirs.loss) <= self.case.loss_tolerance:
            found.append(f"loss {self.ours.loss:.4f}, published {theirs.loss:.4f}")
        for kind in ("attention", "mlp"):
            overlap = self.overlap(kind)
            if overlap is not None and overlap.share < MIN_OVERLAP:
                found.append(f"{overlap.shared} of {overlap.of} kept {kind} units shared")
        return tuple(found)


@dataclass(frozen=True, slots=True)
class VariantResult:
    """Our method at the matched sparsity under some settings; the first of a method's is its defaults."""

    settings: Mapping[str, JsonValue]
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class MethodFidelity:
    """All that was run for one method."""

    method: str
    cases: tuple[CaseResult, ...]
    variants: tuple[VariantResult, ...]

    @property
    def disagreements(self) -> tuple[str, ...]:
        """What is not the published result, with the name of the case."""
        return tuple(f"{r.case.name}: {text}" for r in self.cases for text in r.disagreements)


def verify(methods: tuple[str, ...], golden: Golden, tell: Tell) -> Iterator[MethodFidelity]:
    """Run every case and variant of every method, each in a process of its own.

    Args:
        methods: names in the registry, of methods with published figures.
        golden: the figures.
        tell: receives a line for every run that ends.
    """
    structure = load_dense().structure
    for method in methods:
        cases = golden.cases(method, structure)
        results = []
        for case in cases:
            results.append(CaseResult(case, settings_of(case), in_fresh_process(replay, case, golden)))
            tell(_line(results[-1]))
        variants = []
        for settings in variants_of(method):
            outcome = in_fresh_process(prune_to, method, settings, MATCHED_SPARSITY, cases[0].calibration, golden)
            variants.append(VariantResult(settings, outcome))
            tell(f"{method} {dict(settings) or 'defaults'}: loss {outcome.loss:.4f}, {outcome.seconds:.1f} s")
        yield MethodFidelity(method, tuple(results), tuple(variants))


def variants_of(method: str) -> tuple[Mapping[str, JsonValue], ...]:
    """The defaults, and the settings whose effect is measured; bfloat16 only where the processor computes in it."""
    variants = ({}, *reimplemented(method, {}).variants)
    native = fast_dtype("cpu") == "bfloat16"
    return tuple(settings for settings in variants if native or settings.get("pass_dtype") != "bfloat16")


def _line(result: CaseResult) -> str:
    verdict = "; ".join(result.disagreements) or "as published"
    ours, theirs = result.ours, result.case.figures
    return f"{result.case.name}: {verdict} (loss {ours.loss:.4f}, published {theirs.loss:.4f}; {ours.seconds:.1f} s)"
