"""The fidelity page: tables of what `harness verify` ran, and each method's own words on where it departs."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from pydantic import JsonValue
from tabulate import tabulate

from harness.fidelity.verify import MATCHED_SPARSITY, CaseResult, MethodFidelity, Overlap, VariantResult
from harness.registry import method_class

MIB = 2**20

INTRODUCTION = f"""# Fidelity: ours against the published implementations

Written by `harness verify --out docs/fidelity.md`; every figure comes from that run. The published figures were
measured by running each method's published code on the embedded model (SmolLM2-135M-Instruct, float32, CPU) with fixed
calibration tokens; ours are given the same tokens and the settings named. Loss is the mean next-token loss in nats on
the same 16 held-out sequences of 256 tokens; the dense model's is 4.0274. Seconds and peak memory are those of the
pruning step, each run in a process of its own; the published ones were measured on another machine of the same kind,
and single runs vary by a third.

The second table of each method departs from our defaults one setting at a time, at {MATCHED_SPARSITY:.0%} of all
parameters removed. Kept units are compared with those of the defaults. Passes in bfloat16 (`pass_dtype`) are measured
only where the processor computes in bfloat16; elsewhere they are emulated, many times slower.
"""


def fidelity_page(results: Sequence[MethodFidelity], machine: str) -> str:
    """The page as Markdown.

    Args:
        results: one per method.
        machine: what it ran on, in a line.
    """
    sections = [_section(result) for result in results]
    return "\n".join([INTRODUCTION, f"Ran on {machine}.\n", *sections]).rstrip() + "\n"


def case_table(results: Iterable[CaseResult]) -> str:
    """Published cases, ours beside theirs, as a Markdown table."""
    return tabulate([_case_row(result) for result in results], headers="keys", tablefmt="pipe", disable_numparse=True)


def variant_table(variants: Sequence[VariantResult]) -> str:
    """Our settings at the matched sparsity as a Markdown table, the defaults first."""
    rows = [_variant_row(variant, variants[0]) for variant in variants]
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def departures(method: str) -> str:
    """The ``Differs:`` parts of a method's docstring and of its settings, as Markdown."""
    cls = method_class(method)
    found = [_differs(inspect.getdoc(cls) or "")]
    for name, field in cls.model_fields.items():
        text = _differs(inspect.cleandoc(field.description or ""))
        if text:
            found.append(f"- `{name}`: {' '.join(text.split())}")
    return "\n".join(part for part in found if part)


def _section(result: MethodFidelity) -> str:
    cls = method_class(result.method)
    parts = [f"## {result.method} ({cls.paper})\n", case_table(result.cases)]
    if result.disagreements:
        parts.append("\nNot as published:\n" + "\n".join(f"- {text}" for text in result.disagreements))
    parts.append("\nSettings of the cases:\n")
    parts += [f"- `{r.case.name}`: {_settings(r.settings)}, ratio {r.case.knob:.4g}" for r in result.cases]
    parts += ["\nWhere ours departs, and why:\n", departures(result.method)]
    parts += [f"\nWhat each choice does at {MATCHED_SPARSITY:.0%}:\n", variant_table(result.variants), ""]
    return "\n".join(parts)


def _case_row(result: CaseResult) -> dict[str, str]:
    ours, theirs = result.ours, result.case.figures
    return {
        "case": result.case.name,
        "heads kept alike": _fraction(result.overlap("attention")),
        "channels kept alike": _fraction(result.overlap("mlp")),
        "parameters": f"{ours.params:,}",
        "published": f"{theirs.params:,}",
        "loss": f"{ours.loss:.4f}",
        "published ": f"{theirs.loss:.4f}",
        "difference": f"{ours.loss - theirs.loss:+.1e}",
        "seconds": f"{ours.seconds:.1f}",
        "published  ": "" if theirs.seconds is None else f"{theirs.seconds:.1f}",
        "peak MiB": f"{ours.peak_bytes / MIB:,.0f}",
        "published   ": "" if theirs.peak_bytes is None else f"{theirs.peak_bytes / MIB:,.0f}",
    }


def _variant_row(variant: VariantResult, default: VariantResult) -> dict[str, str]:
    ours, base = variant.outcome, default.outcome
    shared = {"attention": "", "mlp": ""}
    if ours.kept is not None and base.kept is not None:
        for kind in shared:
            shared[kind] = _fraction(Overlap.between(ours.kept, base.kept, kind))
    return {
        "settings": _settings(variant.settings) if variant.settings else "defaults",
        "parameters": f"{ours.params:,}",
        "heads kept alike": shared["attention"],
        "channels kept alike": shared["mlp"],
        "loss": f"{ours.loss:.4f}",
        "against defaults": "" if variant is default else f"{ours.loss - base.loss:+.4f}",
        "seconds": f"{ours.seconds:.1f}",
        "peak MiB": f"{ours.peak_bytes / MIB:,.0f}",
    }


def _fraction(overlap: Overlap | None) -> str:
    return "" if overlap is None else f"{overlap.shared:,} of {overlap.of:,}"


def _settings(settings: Mapping[str, JsonValue]) -> str:
    return ", ".join(f"`{name}={json.dumps(value)}`" for name, value in settings.items())


def _differs(docstring: str) -> str:
    """The text of the part headed ``Differs:``, up to the next part that is not indented."""
    _, heading, rest = docstring.partition("Differs:")
    if not heading:
        return ""
    first, _, following = rest.partition("\n")
    lines = []
    for line in following.splitlines():
        if line.strip() and not line.startswith(" ") and not first.strip():
            break
        lines.append(line)
    return (first.strip() + "\n" + textwrap.dedent("\n".join(lines))).strip()
