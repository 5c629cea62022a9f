"""One model, one evaluation spec: the measures, and one row per scored document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import pandas as pd
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.corpora import load_corpus
from harness.evaluation.embedded_data import fingerprint
from harness.evaluation.forest_pass import Progress
from harness.evaluation.heldout import measure_heldout
from harness.evaluation.heldout_text import HeldOutText
from harness.evaluation.quiet import quiet, templates_compiled_once
from harness.evaluation.reference import Dense, dense_reference
from harness.evaluation.scorer import TrieScorer
from harness.evaluation.tasks import TaskSet, build_tasks
from harness.records import EvaluationSpec, Measure

PRIMARY_METRICS = ("acc_norm", "acc")
"""The table shows the first of these that a task has."""

COLUMNS = (
    "task", "group", "doc_id", "doc_hash", "target", "loglikelihoods", "greedy", "acc", "acc_norm", "margin",
    "chance",
)  # fmt: skip
"""Of the per-document table."""


@dataclass(frozen=True)
class Evaluation:
    """What scoring one model gave."""

    measures: tuple[Measure, ...]
    documents: pd.DataFrame
    """One row per (task, document). ``target`` is the index of the right choice; it and ``acc``, ``acc_norm``,
    ``margin`` and ``chance`` are NA where the task has no such thing."""
    data_fingerprints: dict[str, str]
    """Task or corpus -> hash of the documents that were scored."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _HeldOut:
    measures: tuple[Measure, ...] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    *,
    batch_tokens: int,
    dense: Dense | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model, on the device and in the dtype it is in.

    Args:
        model: a causal language model; in evaluation mode afterwards, otherwise as it was.
        tokenizer: the model's own.
        spec: which documents, and how.
        batch_tokens: tokens run at once; changes speed and memory, not results.
        dense: the model to measure the divergence from; None measures none.
        cache: a folder for what the models of a comparison share: tokens of requests, the dense model's states.
        progress: called with (tokens run, tokens in all), held-out text first and then tasks.

    Raises:
        UserError: unknown tasks, or data that cannot be reached.
        NonFiniteOutputError: the model gives NaN or infinity.
    """
    model.eval()
    task_set = build_tasks(spec)
    task_set.reseed()
    heldout = _heldout(model, tokenizer, spec, dense, cache, batch_tokens, progress)
    with quiet(), templates_compiled_once():
        scorer = TrieScorer(model, tokenizer, batch_tokens=batch_tokens, cache=cache, progress=progress)
        # evaluate(), not simple_evaluate(): the latter also collects facts about the machine, for seconds.
        results = lm_eval.evaluate(
            lm=scorer,
            task_dict=TaskManager(include_defaults=False).load(list(task_set.objects)),
            samples=dict(task_set.samples),
            bootstrap_iters=0,
        )
        documents = pd.DataFrame(list(_rows(task_set, results["samples"])), columns=list(COLUMNS))
    documents = documents.astype(
        {"target": "Int64", **dict.fromkeys(("acc", "acc_norm", "margin", "chance"), "Float64")}
    )
    fingerprints = dict(heldout.fingerprints)
    for name, leaves in _leaves_by_name(task_set).items():
        fingerprints[name] = fingerprint(row for leaf in leaves for row in task_set.documents(leaf))
    measures = (*_task_measures(task_set, results, documents), *heldout.measures)
    return Evaluation(measures, documents, fingerprints, (*task_set.notes, *scorer.notes, *heldout.notes))


def _heldout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    dense: Dense | None,
    cache: Path | None,
    batch_tokens: int,
    progress: Progress | None,
) -> _HeldOut:
    if not spec.heldout_tokens:
        return _HeldOut()
    corpus = load_corpus("heldout")
    text = HeldOutText.of(corpus, tokenizer, spec.heldout_tokens, spec.heldout_length)
    reference = dense_reference(dense, text, batch_tokens, cache) if dense is not None else None
    why_not = reference if isinstance(reference, str) else None
    found = measure_heldout(
        model,
        text,
        batch_tokens=batch_tokens,
        reference=None if isinstance(reference, str) else reference,
        progress=progress,
    )

    def measure(name: str, unit: str, value: float, stderr: float | None) -> Measure:
        return Measure(
            name=f"heldout/{name}",
            value=value,
            unit=unit,
            higher_is_better=False,
            stderr=stderr,
            num_examples=found.num_scored,
        )

    stderr = None if found.loss.stderr is None else found.ppl_token * found.loss.stderr
    measures = [
        measure("ppl_token", "perplexity", found.ppl_token, stderr),
        measure("ppl_word", "perplexity", found.ppl_word, None),
    ]
    if found.kl_dense is not None:
        measures.append(measure("kl_dense", "nats/token", found.kl_dense.value, found.kl_dense.stderr))
    elif dense is not None:
        why_not = why_not or "the model has no plain output embedding"
    notes = (f"the KL divergence from the dense model was not measured: {why_not}",) if why_not else ()
    return _HeldOut(tuple(measures), {"heldout": corpus.fingerprint()}, notes)


def _leaves_by_name(task_set: TaskSet) -> dict[str, list[str]]:
    leaves: dict[str, list[str]] = {}
    for leaf, name in task_set.group_of.items():
        leaves.setdefault(name, []).append(leaf)
    return leaves


def _rows(task_set: TaskSet, samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The per-document table, from what lm-eval logs."""
    for leaf, logged in samples.items():
        for sample in logged:
            scores = [responses[0] for responses in sample["resps"]]
            if "acc_mutual_info" in sample:  # whose requests without a context follow those with one
                scores = scores[: len(scores) // 2]
            if not isinstance(scores[0], tuple):  # a rolling perplexity has no choices
                continue
            loglikelihoods = [loglikelihood for loglikelihood, _ in scores]
            target = task_set.right_choice(leaf, sample["doc"])
            yield {
                "task": leaf,
                "group": task_set.group_of[leaf],
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "target": target,
                "loglikelihoods": loglikelihoods,
                "greedy": [greedy for _, greedy in scores],
                "acc": sample.get("acc"),
                "acc_norm": sample.get("acc_norm"),
                "margin": right_margin(loglikelihoods, target),
                "chance": task_set.chance(leaf, sample["doc"]),
            }


def right_margin(loglikelihoods: Sequence[float], target: int | None) -> float | None:
    """By how many nats the right choice is likelier than the likeliest wrong one; negative where it loses.

    The log-likelihoods are those of whole choices, as plain accuracy compares them. None where nothing is chosen from.
    """
    if target is None or len(loglikelihoods) < 2:
        return None
    return loglikelihoods[target] - max(ll for i, ll in enumerate(loglikelihoods) if i != target)


def _task_measures(task_set: TaskSet, results: dict[str, Any], documents: pd.DataFrame) -> Iterator[Measure]:
    """Measures of tasks, and of groups with their subgroups (their single tasks stand in the documents)."""
    for item in task_set.objects:
        if isinstance(item, Group):
            for group in (item, *item.get_all_groups()):
                leaves = [task.task_name for task in group.get_all_tasks()]
                yield from _measures(
                    group.name.replace("::", "_").replace(" ", "_"), results["results"][group.name], documents, leaves
                )
        else:
            yield from _measures(item.task_name, results["results"][item.task_name], documents, [item.task_name])


def _measures(name: str, result: dict[str, Any], documents: pd.DataFrame, leaves: list[str]) -> Iterator[Measure]:
    rows = documents[documents["task"].isin(leaves)]
    for key, value in result.items():
        metric, _, filter_name = key.partition(",")
        if filter_name != "none" or metric.endswith("_stderr"):
            continue
        is_accuracy = metric in PRIMARY_METRICS
        yield Measure(
            name=f"{name}/{metric}",
            value=float(value),
            unit="fraction" if is_accuracy else "bits/byte" if metric == "bits_per_byte" else "perplexity",
            higher_is_better=is_accuracy,
            stderr=_stderr(rows, metric) if is_accuracy else None,
            num_examples=int(result["sample_len"]),
            chance=_chance(rows) if is_accuracy else None,
        )
    if not rows.empty and rows["margin"].notna().all():
        yield Measure(
            name=f"{name}/margin",
            value=float(rows["margin"].mean()),
            unit="nats",
            higher_is_better=True,
            stderr=_stderr(rows, "margin"),
            num_examples=len(rows),
        )


def _stderr(rows: pd.DataFrame, metric: str) -> float | None:
    """lm-eval's formulas: of the mean over documents, pooled over the tasks of a group."""
    by_task = [group[metric].dropna().astype(float).tolist() for _, group in rows.groupby("task", sort=False)]
    if any(len(scores) < 2 for scores in by_task):
        return None
    stderrs = [mean_stderr(scores) for scores in by_task]
    found = pooled_sample_stderr(stderrs, [len(s) for s in by_task]) if len(by_task) > 1 else stderrs[0]
    return float(found) if math.isfinite(found) else None


def _chance(rows: pd.DataFrame) -> float | None:
    return None if rows.empty or rows["chance"].isna().any() else float(rows["chance"].mean())
