"""The entry point: measures, the table of documents, fingerprints, silence."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from harness.evaluation import run
from harness.evaluation.run import COLUMNS, Evaluation, evaluate, right_margin
from harness.evaluation.tasks import TaskSet
from harness.records import EvaluationSpec, Measure

SPEC = EvaluationSpec(
    tasks=("piqa", "winogrande", "lambada_openai", "mmlu", "sciq"),
    limit=3,
    mmlu_limit=1,
    mmlu_num_fewshot=0,
    heldout_tokens=192,
    heldout_length=64,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random model that reads the real documents letter by letter."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def evaluation(model: PreTrainedModel, letters: PreTrainedTokenizerFast) -> Evaluation:
    return evaluate(model, letters, SPEC, batch_tokens=2048)


def named(evaluation: Evaluation, name: str) -> Measure:
    (measure,) = (m for m in evaluation.measures if m.name == name)
    return measure


def test_every_task_has_its_measures(evaluation: Evaluation) -> None:
    groups = ("mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")
    assert {m.name for m in evaluation.measures} == {
        *(f"{task}/{metric}" for task in ("piqa", "sciq") for metric in ("acc", "acc_norm", "margin")),
        *(f"{task}/{metric}" for task in ("winogrande", *groups) for metric in ("acc", "margin")),
        *("lambada_openai/acc", "lambada_openai/perplexity", "heldout/ppl_token", "heldout/ppl_word"),
    }


def test_measures_are_means_over_the_documents(evaluation: Evaluation) -> None:
    rows = evaluation.documents
    assert list(rows.columns) == list(COLUMNS)
    assert named(evaluation, "piqa/acc_norm").value == pytest.approx(rows[rows.task == "piqa"].acc_norm.mean())
    mmlu = rows[rows.group == "mmlu"]
    assert len(mmlu) == mmlu.task.nunique() == 57
    assert named(evaluation, "mmlu/acc").value == pytest.approx(mmlu.acc.mean())
    assert named(evaluation, "mmlu/acc").num_examples == 57
    lambada = rows[rows.task == "lambada_openai"]
    surprise = -sum(choices[0] for choices in lambada.loglikelihoods) / 3
    assert named(evaluation, "lambada_openai/perplexity").value == pytest.approx(math.exp(surprise))


def test_what_a_task_does_not_have_is_absent(evaluation: Evaluation) -> None:
    rows = evaluation.documents.set_index("task")
    assert rows.loc["winogrande"].acc_norm.isna().all()
    assert rows.loc["lambada_openai", ["target", "margin", "chance"]].isna().all(axis=None)
    assert named(evaluation, "lambada_openai/acc").chance is None
    assert named(evaluation, "winogrande/acc").chance == 0.5


def test_the_best_scored_choice_is_what_accuracy_counts(evaluation: Evaluation) -> None:
    rows = evaluation.documents[evaluation.documents.target.notna()]
    best = rows.loglikelihoods.map(lambda lls: lls.index(max(lls)))
    assert (best == rows.target).eq(rows.acc == 1).all()


def test_the_margin_is_how_far_the_right_choice_leads(evaluation: Evaluation) -> None:
    rows = evaluation.documents[evaluation.documents.target.notna()]
    assert (rows.margin > 0).eq(rows.acc == 1).all()
    for (right, wrong), target, margin in zip(
        rows[rows.task == "piqa"].loglikelihoods, rows[rows.task == "piqa"].target, rows.margin, strict=False
    ):
        assert margin == pytest.approx(right - wrong if target == 0 else wrong - right)
    margins = rows[rows.task == "piqa"].margin.astype(float)
    assert named(evaluation, "piqa/margin").value == pytest.approx(margins.mean())
    assert named(evaluation, "piqa/margin").stderr == pytest.approx(margins.std() / math.sqrt(3))


def test_a_document_with_one_choice_is_always_right_and_has_no_margin() -> None:
    assert right_margin([-1.5], 0) is None
    assert right_margin([-1.5, -2.0, -1.0], 0) == -0.5
    assert right_margin([-1.5, -2.0], None) is None


def test_a_standard_error_needs_two_documents_of_every_task(evaluation: Evaluation) -> None:
    acc = evaluation.documents[evaluation.documents.task == "piqa"].acc.astype(float)
    assert named(evaluation, "piqa/acc").stderr == pytest.approx(acc.std() / math.sqrt(3))
    assert named(evaluation, "mmlu/acc").stderr is None


def test_fingerprints_name_what_was_scored(evaluation: Evaluation) -> None:
    assert set(evaluation.data_fingerprints) == {*SPEC.tasks, "heldout"}
    assert all(len(value) == 64 for value in evaluation.data_fingerprints.values())
    assert any("sciq" in note for note in evaluation.notes)


def test_batches_and_repetition_change_nothing_and_nothing_is_printed(
    evaluation: Evaluation,
    model: PreTrainedModel,
    letters: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    seen: list[tuple[int, int]] = []
    spec = SPEC.model_copy(update={"tasks": ("piqa",), "heldout_tokens": 0})
    again = evaluate(model, letters, spec, batch_tokens=100, progress=lambda *step: seen.append(step))
    assert capfd.readouterr() == ("", "")
    assert seen[-1][0] == seen[-1][1]
    assert [m.name for m in again.measures] == ["piqa/acc", "piqa/acc_norm", "piqa/margin"]
    first = evaluation.documents[evaluation.documents.task == "piqa"]
    pd.testing.assert_frame_equal(
        again.documents.drop(columns="loglikelihoods"), first.drop(columns="loglikelihoods").reset_index(drop=True)
    )
    for one, other in zip(again.documents.loglikelihoods, first.loglikelihoods, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_a_question_with_a_single_choice_is_scored_beside_others(
    model: PreTrainedModel, letters: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [
        {"question": "Why?", "choices": ["so"], "answer": 0},
        {"question": "Who?", "choices": ["he", "she", "it"], "answer": 1},
    ]
    task = ConfigurableTask(
        config={
            "task": "single",
            "dataset_path": "none",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
            "test_split": "test",
            "num_fewshot": 0,
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}],
        }
    )
    task_set = TaskSet((task,), {"single": task}, {"single": "single"})
    monkeypatch.setattr(run, "build_tasks", lambda _spec: task_set)
    found = evaluate(model, letters, EvaluationSpec(tasks=("single",), heldout_tokens=0), batch_tokens=64)
    alone, chosen = found.documents.itertuples()
    assert (alone.acc, alone.chance, len(alone.loglikelihoods)) == (1, 1.0, 1)
    assert pd.isna(alone.margin)
    assert not pd.isna(chosen.margin)
    # A mean over half of the documents would pass for one over all.
    assert "single/margin" not in {m.name for m in found.measures}
