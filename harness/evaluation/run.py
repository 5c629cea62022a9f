"""One model, one evaluation spec: the measures, and one row per scored document."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
from harness.evaluation.perplexity import measure_perplexity
from harness.evaluation.quiet import quiet, templates_compiled_once
from harness.evaluation.scorer import TrieScorer
from harness.evaluation.tasks import TaskSet, build_tasks
from harness.records import EvaluationSpec, Measure

PRIMARY_METRICS = ("acc_norm", "acc")
"""The table shows the first of these that a task has."""

COLUMNS = (
    "task", "group", "doc_id", "doc_hash", "target", "loglikelihoods", "greedy", "acc", "acc_norm", "chance"
)  # fmt: skip
"""Of the per-document table."""


@dataclass(frozen=True)
class Evaluation:
    """What scoring one model gave."""

    measures: tuple[Measure, ...]
    documents: pd.DataFrame
    """One row per (task, document). ``target`` is the index of the right choice; it and ``acc``, ``acc_norm`` and
    ``chance`` are NA where the task has no such thing."""
    data_fingerprints: dict[str, str]
    """Task or corpus -> hash of the documents that were scored."""
    notes: tuple[str, ...]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    *,
    batch_tokens: int,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model, on the device and in the dtype it is in.

    Args:
        model: a causal language model; in evaluation mode afterwards, otherwise as it was.
        tokenizer: the model's own.
        spec: which documents, and how.
        batch_tokens: tokens run at once; changes speed and memory, not results.
        progress: called with (tokens run, tokens in all), held-out text first and then tasks.

    Raises:
        UserError: unknown tasks, or data that cannot be reached.
        NonFiniteOutputError: the model gives NaN or infinity.
    """
    model.eval()
    task_set = build_tasks(spec)
    heldout, fingerprints = _heldout(model, tokenizer, spec, batch_tokens, progress)
    with quiet(), templates_compiled_once():
        scorer = TrieScorer(model, tokenizer, batch_tokens=batch_tokens, progress=progress)
        # evaluate(), not simple_evaluate(): the latter also collects facts about the machine, for seconds.
        results = lm_eval.evaluate(
            lm=scorer,
            task_dict=TaskManager(include_defaults=False).load(list(task_set.objects)),
            samples=dict(task_set.samples),
            bootstrap_iters=0,
        )
        documents = pd.DataFrame(list(_rows(task_set, results["samples"])), columns=list(COLUMNS))
    documents = documents.astype({"target": "Int64", "acc": "Float64", "acc_norm": "Float64", "chance": "Float64"})
    for name, leaves in _leaves_by_name(task_set).items():
        fingerprints[name] = fingerprint(row for leaf in leaves for row in task_set.documents(leaf))
    measures = (*_task_measures(task_set, results, documents), *heldout)
    return Evaluation(measures, documents, fingerprints, (*task_set.notes, *scorer.notes))


def _heldout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    batch_tokens: int,
    progress: Progress | None,
) -> tuple[list[Measure], dict[str, str]]:
    if not spec.heldout_tokens:
        return [], {}
    corpus = load_corpus("heldout")
    found = measure_perplexity(
        model,
        tokenizer,
        corpus,
        num_tokens=spec.heldout_tokens,
        length=spec.heldout_length,
        batch_tokens=batch_tokens,
        progress=progress,
    )

    def measure(name: str, value: float, stderr: float | None) -> Measure:
        return Measure(
            name=f"heldout/{name}",
            value=value,
            unit="perplexity",
            higher_is_better=False,
            stderr=stderr,
            num_examples=found.num_scored,
        )

    stderr = None if found.loss_stderr is None else found.token * found.loss_stderr
    return [measure("ppl_token", found.token, stderr), measure("ppl_word", found.word, None)], {
        "heldout": corpus.fingerprint()
    }


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
            if not isinstance(scores[0], tuple):  # a rolling perplexity has no choices
                continue
            yield {
                "task": leaf,
                "group": task_set.group_of[leaf],
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "target": task_set.right_choice(leaf, sample["doc"]),
                "loglikelihoods": [loglikelihood for loglikelihood, _ in scores],
                "greedy": [greedy for _, greedy in scores],
                "acc": sample.get("acc"),
                "acc_norm": sample.get("acc_norm"),
                "chance": task_set.chance(leaf, sample["doc"]),
            }


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
