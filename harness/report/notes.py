"""The notes under a leaderboard: what its numbers mean, what they rest on, what went wrong, how to get them again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from harness import statistics
from harness.records import Provenance, RunRecord
from harness.report.cells import TIED
from harness.report.efficiency import efficiency_notes
from harness.report.frame import CHANCE
from harness.report.rows import REFERENCE_METHOD, Row
from harness.report.scores import COMMONSENSE, MMLU, RowScores


def notes(rows: Sequence[Row], scores: Mapping[Row, RowScores], command: str | None) -> list[str]:
    """One note per paragraph, most needed first.

    Args:
        rows: of the table.
        scores: of the rows that have any.
        command: the command line that makes the table anew, where it is known.
    """
    scored = [row for row in rows if row.status == "ok"]
    written = [
        *_outcomes(rows),
        *_meaning_of_scores(scored, scores),
        *_meaning_of_sparsity(rows),
        *_seeds(scored),
        *(_models(scored) + _documents(scored) + _heldout(scored) + _calibration(scored)),
        *efficiency_notes(scored),
        *_record_notes(scored),
        *_versions(scored),
    ]
    return [*written, f"To reproduce: `{command}`."] if command else written


def row_name(row: Row) -> str:
    """``flap at 20%``, with the settings that tell it from its like."""
    settings = f" ({row.settings})" if row.settings else ""
    return f"{row.spec.method}{settings} at {100 * row.spec.sparsity:.4g}%"


def ppl_heading(rows: Iterable[Row]) -> str:
    """Column head that names the convention of the perplexity."""
    lengths = sorted({row.spec.evaluation.heldout_length for row in rows if row.spec.evaluation.heldout_tokens})
    windows = " or ".join(str(length) for length in lengths)
    return f"ppl/token ({windows}-token windows)" if lengths else "ppl/token"


def _outcomes(rows: Sequence[Row]) -> list[str]:
    """What did not run, and why: without this, a missing score would be a riddle."""
    has_seeds = any(len(row.records) > 1 for row in rows)
    where: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        for record in row.records if row.status != "ok" else ():
            reason = " ".join((record.reason or "no reason was recorded").split()).rstrip(".")
            settings = f" ({row.settings})" if row.settings else ""
            seed = f" seed {record.spec.seed}" if has_seeds else ""
            target = f"{100 * record.spec.sparsity:.4g}%{seed}"
            where[f"{row.spec.method}{settings} {row.status} at {{}}: {reason}."][target] = None
    return [text.replace("{}", ", ".join(targets), 1) for text, targets in where.items()]


def _meaning_of_scores(rows: Sequence[Row], scores: Mapping[Row, RowScores]) -> list[str]:
    averaged = dict.fromkeys(scores[row].averaged_tasks for row in rows if row in scores and scores[row].average)
    out = [_meaning_of_average(tasks) for tasks in averaged]
    if averaged:
        out.append(
            f"Bold: the highest average of its model and sparsity; {TIED}: not significantly below it (paired "
            f"bootstrap, 5%, Holm-corrected). {REFERENCE_METHOD} and {CHANCE} do not compete; {CHANCE} is what "
            "guessing scores, its interval where 95% of guessers land."
        )
    if any(scores[row].margin for row in rows if row in scores):
        out.append(
            "The margin says by how many nats the right choice is likelier than the likeliest wrong one (whole "
            "choices, not length-normalised), averaged over the tasks of the average; below 0 the wrong one leads."
        )
    without = [row_name(row) for row in rows if row not in scores]
    if without:
        out.append(f"No per-document scores are stored for {', '.join(without)}: neither averages nor intervals.")
    return out


def _meaning_of_average(tasks: Sequence[str]) -> str:
    all_of_them = len(tasks) == len(COMMONSENSE)
    left_out = "" if all_of_them else f" (only {len(tasks)} of the {len(COMMONSENSE)} commonsense tasks were scored)"
    return (
        f"Scores are percent right. The average is the mean over {', '.join(tasks)}{left_out}: acc_norm where the task "
        f"has it, else acc. Intervals are 95%, from {statistics.RESAMPLES:,} bootstrap resamples of the documents "
        f"within each task; Δ is the paired difference from {REFERENCE_METHOD} on the same documents."
    )


def _meaning_of_sparsity(rows: Sequence[Row]) -> list[str]:
    of_what = {"total": "all parameters", "non-embedding": "the parameters outside embedding and head"}
    bases = sorted({row.spec.basis for row in rows if not row.is_reference}) or ["total"]
    meant = " or ".join(f"{basis} ({of_what[basis]})" for basis in bases)
    text = (
        "Sparsity is the share of the dense model's parameters that was removed, counted from the weights, a tied "
        f"tensor once; its basis is {meant}. The knob is the method's own setting that meets the target."
    )
    shared = (
        "The sparsities of a method share one pass: its seconds of pruning stand at the smallest, and at the others "
        "what they took beyond it."
    )
    several = len({row.spec.sparsity for row in rows if not row.is_reference}) > 1
    return [text, *([shared] if several else []), *_ties(rows)]


def _ties(rows: Sequence[Row]) -> list[str]:
    methods: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for row in rows:
        for record in row.records:
            if record.tied_embeddings is not None:
                methods[record.tied_embeddings][row.spec.method] = None
    untied = ", ".join(methods[False])
    if methods[True]:
        return [f"Embedding and head are one tensor{f', but two in {untied}' if untied else ''}."]
    return ["Embedding and head are two tensors."] if untied else []


def _seeds(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    counts = {len(row.records) for row in rows if not row.is_reference} or {1}
    if counts == {1}:
        return [
            "One seed: the noise of the calibration draw is not in the intervals; a claim needs at least three seeds."
        ]
    single = " Rows with one seed lack that noise." if 1 in counts else ""
    return [
        f"Each seed draws its own calibration. Rows with several (up to {max(counts)}) show the mean and the sample "
        f"standard deviation over seeds; their intervals resample seeds, then documents.{single}"
    ]


def _models(rows: Sequence[Row]) -> list[str]:
    def describe(record: RunRecord) -> str:
        revision = f" at revision {record.spec.model.revision}" if record.spec.model.revision else ""
        size = f", {record.params_before.total:,} parameters" if record.params_before else ""
        weights = f", weights sha256 {record.provenance.weights_sha256[:12]}" if record.provenance else ""
        return f"{record.spec.model.name}{revision}: {record.spec.dtype}{size}{weights}"

    return [f"Model {text}." for text in _distinct(rows, describe)]


def _documents(rows: Sequence[Row]) -> list[str]:
    def describe(record: RunRecord) -> str:
        evaluation = record.spec.evaluation
        counts: dict[int, list[str]] = defaultdict(list)
        for measure in record.measures:
            task, _, metric = measure.name.rpartition("/")
            if metric == "acc" and measure.num_examples and task in evaluation.tasks and task != MMLU:
                counts[measure.num_examples].append(task)
        parts = [f"{count} of {', '.join(names)}" for count, names in counts.items()]
        if mmlu := record.measure(f"{MMLU}/acc"):
            subject = f"{evaluation.mmlu_limit} a subject" if evaluation.mmlu_limit else "all"
            parts.append(f"{mmlu.num_examples} of MMLU ({subject}, {evaluation.mmlu_num_fewshot}-shot)")
        drawn = f", chosen by seed {evaluation.document_seed}" if evaluation.limit or evaluation.mmlu_limit else ""
        return f"({evaluation.data} data{drawn}): {'; '.join(parts)}" if parts else ""

    return [f"Documents {text}." for text in _distinct(rows, describe)]


def _heldout(rows: Sequence[Row]) -> list[str]:
    def describe(record: RunRecord) -> str:
        evaluation = record.spec.evaluation
        if not record.measure("heldout/ppl_token"):
            return ""
        return f"over {evaluation.heldout_tokens:,} held-out tokens in windows of {evaluation.heldout_length}"

    found = [f"Perplexity is per token of the model's own tokenizer, {text}." for text in _distinct(rows, describe)]
    if any(record.measure("heldout/kl_dense") for row in rows for record in row.records):
        found.append(
            f"KL/token is the divergence, in nats, of a model's next-token distribution from {REFERENCE_METHOD}'s, "
            "averaged over the same tokens: 0 is the dense model itself; its interval is over windows of the text."
        )
    return found


def _calibration(rows: Sequence[Row]) -> list[str]:
    drawn: dict[str, dict[str, None]] = defaultdict(dict)
    for record in (record for row in rows for record in row.records):
        spec, made = record.spec.calibration, record.provenance
        if spec and made and made.calibration_sha256:
            text = f"{spec.source}, {spec.num_samples} x {spec.num_tokens} tokens"
            drawn[text][f"seed {record.spec.seed}: {made.calibration_sha256[:12]}"] = None
    return [f"Calibration: {text}; sha256 of the token ids by {', '.join(ids)}." for text, ids in drawn.items()]


def _record_notes(rows: Sequence[Row]) -> list[str]:
    """Every note once, with the methods it is about unless it is about all."""
    about: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for note in dict.fromkeys(note for record in row.records for note in record.notes):
            about[note].append(row.spec.method)
    methods = {row.spec.method for row in rows}
    return [
        note if set(names) == methods else f"{', '.join(dict.fromkeys(names))}: {note}" for note, names in about.items()
    ]


def _versions(rows: Sequence[Row]) -> list[str]:
    def describe(provenance: Provenance) -> str:
        packages = ", ".join(f"{name} {version}" for name, version in sorted(provenance.packages.items()))
        commit = f" (commit {provenance.commit})" if provenance.commit else ""
        where = f"{provenance.device}, {provenance.num_threads} threads"
        if provenance.matmul != "torch":
            where += f", float32 products by {provenance.matmul}"
        return f"harness {provenance.harness_version}{commit}, {packages}; {where}"

    found = _distinct(rows, lambda record: describe(record.provenance) if record.provenance else "")
    several = " (the rows were made with different ones)" if len(found) > 1 else ""
    return [f"Versions{several}: {text}." for text in found]


def _distinct(rows: Iterable[Row], describe: Callable[[RunRecord], str]) -> list[str]:
    return [text for text in dict.fromkeys(describe(record) for row in rows for record in row.records) if text]
