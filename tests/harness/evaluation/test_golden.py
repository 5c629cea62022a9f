"""Log-likelihoods, answers and prompts equal those of stock lm-eval, measured once on the embedded model and data."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from harness.budget import ParameterTarget
from harness.calibration import draw_calibration
from harness.evaluation.quiet import quiet, templates_compiled_once
from harness.evaluation.scorer import TrieScorer
from harness.evaluation.tasks import build_tasks
from harness.models import LoadedModel
from harness.records import CalibrationSpec, EvaluationSpec
from harness.registry import build_method

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
    differences = []
    for key, row in rows.items():
        sample = found[key]
        differences += [abs(r[0][0] - ll) for r, ll in zip(sample["resps"], row["ll"], strict=True)]
        assert sample["prompt_hash"] == row["prompt_hash"], key
        assert [r[0][0] for r in sample["resps"]] == pytest.approx(row["ll"], abs=2e-3), key
        assert [r[0][1] for r in sample["resps"]] == row["greedy"], key
        assert sample["target"] == row["target"], key
        assert {k: sample.get(k) for k in ("acc", "acc_norm")} == {k: row.get(k) for k in ("acc", "acc_norm")}, key
    # Seen with -s: the equality report of docs/evaluation.md.
    print(
        f"{', '.join(tasks)}: {len(rows)} documents, {len(differences)} log-likelihoods, difference at most "
        f"{max(differences):.1e}, median {statistics.median(differences):.1e}; acc, acc_norm and is_greedy equal"
    )


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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flap", "slicegpt"])
def test_pruned_models_score_as_in_stock_lm_eval(smollm2: LoadedModel, method: str) -> None:
    calibration = draw_calibration(CalibrationSpec(num_samples=4, num_tokens=64), smollm2.tokenizer, 0).tokens
    target = ParameterTarget(0.2, "total", smollm2.params)
    model = next(build_method(method, {}).prune(smollm2, calibration, [target], 0)).model
    task_set = build_tasks(EvaluationSpec(tasks=("suite",), mmlu_limit=1, limit=2))
    with quiet(), templates_compiled_once():
        ours = TrieScorer(model, smollm2.tokenizer, batch_tokens=1024)
        texts = []
        for leaf in [*task_set.leaves][::6]:
            task = task_set.leaves[leaf]
            task.build_all_requests(samples=task_set.samples[leaf])
            texts += [instance.args for instance in task.instances]
        requests = ours.encoded(texts)
        stock = HFLM(pretrained=model, tokenizer=smollm2.tokenizer, batch_size=8)
        expected = stock._loglikelihood_tokens(requests, disable_tqdm=True)
        found = ours._loglikelihood_tokens(requests)
    assert ours.notes == ()
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    differences = [abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True)]
    print(f"{method} at 20%: {len(found)} log-likelihoods, difference at most {max(differences):.1e}")
    assert max(differences) < 2e-3
