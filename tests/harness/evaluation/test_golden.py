"""Log-likelihoods, answers and prompts equal those of stock lm-eval, measured once on the embedded model and data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from harness.evaluation.quiet import quiet, templates_compiled_once
from harness.evaluation.scorer import TrieScorer
from harness.evaluation.tasks import build_tasks
from harness.models import LoadedModel
from harness.records import EvaluationSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "loglikelihoods.json.gz"
Rows = dict[tuple[str, int], dict[str, Any]]


def golden_rows() -> dict[str, list[dict[str, Any]]]:
    """Task or group -> its documents; float32, batch 16, no chat template, the first documents of each split."""
    cases = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    return {
        name.split("_0shot")[0].split("_5shot")[0]: case["float32"] for name, case in cases.items() if name != "_env"
    }


def assert_equal_to_golden(smollm2: LoadedModel, rows: Rows, tasks: tuple[str, ...]) -> None:
    task_set = build_tasks(EvaluationSpec(tasks=tasks, mmlu_num_fewshot=5))
    samples = {leaf: [doc_id for task, doc_id in rows if task == leaf] for leaf in task_set.leaves}
    objects = [task for leaf, task in task_set.leaves.items() if samples[leaf]]
    with quiet(), templates_compiled_once():
        results = lm_eval.evaluate(
            lm=TrieScorer(smollm2.model, smollm2.tokenizer, batch_tokens=2048),
            task_dict=TaskManager(include_defaults=False).load(objects),
            samples={leaf: ids for leaf, ids in samples.items() if ids},
            bootstrap_iters=0,
        )
    found = {(leaf, s["doc_id"]): s for leaf, logged in results["samples"].items() for s in logged}
    assert found.keys() == rows.keys()
    for key, row in rows.items():
        sample = found[key]
        assert sample["prompt_hash"] == row["prompt_hash"], key
        assert [r[0][0] for r in sample["resps"]] == pytest.approx(row["ll"], abs=2e-3), key
        assert [r[0][1] for r in sample["resps"]] == row["greedy"], key
        assert sample["target"] == row["target"], key
        assert {k: sample.get(k) for k in ("acc", "acc_norm")} == {k: row.get(k) for k in ("acc", "acc_norm")}, key


def test_ten_documents_of_each_task_score_as_in_stock_lm_eval(smollm2: LoadedModel) -> None:
    rows = {}
    for name, documents in golden_rows().items():
        for row in documents[: 6 if name == "mmlu" else 10]:  # of mmlu, two questions of three subjects
            rows[row["task"], row["doc_id"]] = row
    assert len(rows) == 86
    assert_equal_to_golden(smollm2, rows, tuple(golden_rows()))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(golden_rows()))
def test_every_golden_document_scores_as_in_stock_lm_eval(smollm2: LoadedModel, name: str) -> None:
    rows = {(row["task"], row["doc_id"]): row for row in golden_rows()[name]}
    assert_equal_to_golden(smollm2, rows, (name,))
