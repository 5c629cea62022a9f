"""A regression check for people (Markdown), for CI servers (JUnit XML) and for GitHub (annotations)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator

from tabulate import tabulate

from harness.regression.judge import Regression, RunVerdict, Verdict, held_out_loss, interval, p_text, points

_MARKS: dict[Verdict, str] = {"pass": "✅ pass", "fail": "❌ fail", "cannot tell": "❔ cannot tell"}
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Such as colours in a library's message. Source: XML 1.0, production 2."""
_LEVELS: dict[Verdict, str] = {"pass": "notice", "fail": "error", "cannot tell": "warning"}


def headline(regression: Regression) -> str:
    """The verdict and what it is made of, in a line."""
    counts = Counter(run.verdict for run in regression.runs)
    parts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _MARKS if counts[verdict])
    missing = len(regression.only_reference)
    told = f"; {missing} of the reference are not in the candidate" if missing else ""
    return f"{regression.verdict}: {len(regression.runs)} runs compared with the reference ({parts}){told}"


def warnings(regression: Regression) -> Iterator[str]:
    """What a reader must know before believing the verdict."""
    if regression.differences:
        yield "Compared although more than the code differs: " + "; ".join(regression.differences)
    for ids, where in ((regression.only_reference, "candidate"), (regression.only_candidate, "reference")):
        if ids:
            yield f"Not compared, as the {where} has no counterpart: {', '.join(ids)}"


def to_markdown(regression: Regression) -> str:
    """A page: verdict, warnings, a line per run, and what the checks say that do not pass."""
    notes = "".join(f"> [!WARNING]\n> {text}\n\n" for text in warnings(regression))
    table = tabulate([_line(run) for run in regression.runs], headers="keys", tablefmt="pipe", disable_numparse=True)
    details = "".join(
        f"- **{run.run_id}**, {check.name}: {check.verdict}; {check.text}\n"
        for run in regression.runs
        for check in run.checks
        if check.verdict != "pass"
    )
    title = f"# Regression: {_MARKS[regression.verdict]}\n\n{headline(regression)}\n"
    return "\n".join([title, f"{notes}{table}\n", *([details] if details else []), _legend(regression)])


def to_junit(regression: Regression) -> str:
    """JUnit XML: a test case per check of a run; a check that cannot tell is an error, not a failure."""
    checks = [(run, check) for run in regression.runs for check in run.checks]
    counts = Counter(check.verdict for _, check in checks)
    totals = {"tests": str(len(checks)), "failures": str(counts["fail"]), "errors": str(counts["cannot tell"])}
    root = ET.Element("testsuites", totals)
    suite = ET.SubElement(root, "testsuite", {"name": "harness regress", **totals})
    for run, check in checks:
        case = ET.SubElement(suite, "testcase", {"classname": run.run_id, "name": check.name})
        if check.verdict == "pass":
            ET.SubElement(case, "system-out").text = check.text
        else:
            tag = "failure" if check.verdict == "fail" else "error"
            ET.SubElement(case, tag, {"message": check.text, "type": check.verdict})
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode", xml_declaration=True)
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text) + "\n"


def to_annotations(regression: Regression) -> list[str]:
    """GitHub workflow commands: one for the whole, one for every warning and for every check that does not pass."""
    lines = [_command(_LEVELS[regression.verdict], "harness regress", headline(regression))]
    lines += [_command("warning", "harness regress", text) for text in warnings(regression)]
    for run in regression.runs:
        lines += [
            _command(_LEVELS[check.verdict], f"{run.run_id}, {check.name}", check.text)
            for check in run.checks
            if check.verdict != "pass"
        ]
    return lines


def _command(level: str, title: str, text: str) -> str:
    escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    name = title.replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{escaped}"


def _line(run: RunVerdict) -> dict[str, str]:
    spec = run.pair.reference.spec
    seed = f" seed {spec.seed}" if spec.seed else ""
    line = {
        "run": f"{spec.model.name} {spec.method} {100 * spec.sparsity:.4g}%{seed}",
        "verdict": _MARKS[run.verdict],
    }
    told = dict.fromkeys(("reference", "candidate", "Δ [90%]", "p worse", "p allowed", "documents", "needed"), "–")
    if run.evidence is not None:
        average = run.evidence.average
        told = {
            "reference": f"{100 * run.evidence.reference_average:.1f}",
            "candidate": f"{100 * run.evidence.candidate_average:.1f}",
            "Δ [90%]": f"{points(average.value)} {interval(average)}",
            "p worse": p_text(average.p_worse_holm),
            "p allowed": p_text(average.p_allowed),
            "documents": f"{average.num_documents:,}",
            "needed": f"{average.num_needed:,}",
        }
    return line | told | _beside(run)


def _beside(run: RunVerdict) -> dict[str, str]:
    before, after = run.pair.reference, run.pair.candidate
    losses = [held_out_loss(record) for record in (before, after)]
    counted = [record.params_after.total if record.params_after else None for record in (before, after)]
    seconds = [record.phase_seconds.get("prune") for record in (before, after)]
    return {
        "Δ loss": f"{losses[1] - losses[0]:+.4f}" if losses[0] is not None and losses[1] is not None else "–",
        "parameters": f"{counted[1] / counted[0]:.4f}×" if counted[0] and counted[1] else "–",
        "prune time": f"{seconds[1] / seconds[0]:.2f}×" if seconds[0] and seconds[1] else "–",
    }


def _legend(regression: Regression) -> str:
    averaged = next((run.evidence.averaged for run in regression.runs if run.evidence), ())
    allowed = f"{regression.limits.tolerance:g} points"
    return (
        f"Averages are percent right over {', '.join(averaged) or 'no task'}; Δ is the candidate less the reference on "
        "the same documents, paired, in points, its 90% interval from the bootstrap. *p worse* is of a drop, "
        f"Holm-corrected over the runs; *p allowed* is of excluding a drop of {allowed}. A run passes if such a drop "
        f"is excluded at 5%; it fails if a drop is real at 5% and larger than {allowed}, on average or on one task by "
        "McNemar's exact test (the averages have half of the 5%, the tasks the other); otherwise it cannot tell. "
        "*needed*: documents that exclude it in 80% of comparisons, if nothing dropped and answers differ as often as "
        "here. Δ loss is in nats per token; parameters and pruning time are the candidate's over the reference's.\n"
    )
