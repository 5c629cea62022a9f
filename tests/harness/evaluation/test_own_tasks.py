"""Tasks of a user's own, from lm-eval YAML files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from harness.errors import UserError
from harness.evaluation.run import evaluate
from harness.evaluation.tasks import build_tasks, expand_tasks
from harness.models import LoadedModel
from harness.records import EvaluationSpec

YAML = """\
task: capitals
output_type: multiple_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
DOCUMENTS = [
    {"question": f"capital of {country} is", "choices": ["one", "two", "three"][:n], "answer": n - 1}
    for country, n in (("a", 2), ("b", 3), ("c", 2), ("d", 3))
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    data = tmp_path / "capitals.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    path = tmp_path / "capitals.yaml"
    path.write_text(YAML.format(data=data))
    return path


def spec_of(path: Path, **values: int) -> EvaluationSpec:
    names, files = expand_tasks([str(path)])
    return EvaluationSpec(tasks=names, task_files=files, heldout_tokens=0, **values)


def test_a_file_stands_beside_known_tasks_under_its_own_name(task: Path) -> None:
    names, (file,) = expand_tasks(["piqa", str(task)])
    assert names == ("piqa", "capitals")
    assert (file.name, file.path) == ("capitals", str(task))


def test_a_model_is_scored_on_it(
    task: Path, make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    found = evaluate(make_tiny("grouped-query").model, letters, spec_of(task), batch_tokens=64)
    assert found.documents["target"].tolist() == [1, 2, 1, 2]
    assert found.documents["chance"].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 3])
    assert {"capitals/acc", "capitals/acc_norm"} <= {measure.name for measure in found.measures}
    assert set(found.data_fingerprints) == {"capitals"}


def test_another_definition_is_another_run(task: Path) -> None:
    before = spec_of(task)
    task.write_text(task.read_text().replace("{{question}}", "Q: {{question}}"))
    assert spec_of(task) != before
    with pytest.raises(UserError, match="has changed since the run was asked for"):
        build_tasks.__wrapped__(before)


def test_other_documents_or_included_lines_are_another_run(task: Path) -> None:
    included = task.parent / "own.yaml"
    included.write_text(f"include: {task.name}\ntask: others\n")
    before = spec_of(included)
    assert spec_of(included) == before
    task.write_text(task.read_text().replace("{{question}}", "Q: {{question}}"))
    changed = spec_of(included)
    data = task.parent / "capitals.jsonl"
    data.write_text(data.read_text().replace("capital of a", "capital of z"))
    assert len({spec.model_dump_json() for spec in (before, changed, spec_of(included))}) == 3


def test_worked_examples_are_the_same_for_every_model(
    task: Path, make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    task.write_text(task.read_text() + "num_fewshot: 2\nfewshot_split: test\n")
    model, spec = make_tiny("grouped-query").model, spec_of(task)
    first, second = (evaluate(model, letters, spec, batch_tokens=64).documents for _ in range(2))
    assert first["loglikelihoods"].tolist() == second["loglikelihoods"].tolist()


def test_mutual_information_adds_no_choices(
    task: Path, make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    model = make_tiny("grouped-query").model
    plain = evaluate(model, letters, spec_of(task), batch_tokens=64).documents
    task.write_text(task.read_text() + "  - metric: acc_mutual_info\n")
    mutual = evaluate(model, letters, spec_of(task), batch_tokens=64).documents
    assert mutual["margin"].tolist() == pytest.approx(plain["margin"].tolist())


@pytest.mark.parametrize("answer", ["[0, 1]", "'none of them'"])
def test_a_document_without_one_right_choice_has_no_margin(
    task: Path, make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, answer: str
) -> None:
    data = task.parent / "capitals.jsonl"
    documents = [document | {"answer": json.loads(answer.replace("'", '"'))} for document in DOCUMENTS]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    found = evaluate(make_tiny("grouped-query").model, letters, spec_of(task), batch_tokens=64).documents
    assert found["target"].isna().all()
    assert found["margin"].isna().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("task: capitals", "task: mmlu_anatomy"), "which is another's name"),
        (("- metric: acc\n  ", ""), "lacks the metric acc"),
        (("metric_list:", "filter_list: [{name: x, filter: [{function: take_first}]}]\nmetric_list:"), "filter_list"),
        (("{{question}}", "{{question"), "cannot be used: TemplateSyntaxError"),
        (("{{question}}", "{{nothing}}"), "cannot be used"),
        (("test_split: test", "test_split: validation"), "cannot be used"),
        (("metric: acc_norm", "metric: nonsense"), "cannot be used"),
        (('doc_to_choice: "{{choices}}"\n', ""), "cannot be used"),
        (("test_split: test", "test_split: test\nnum_fewshot: 9\nfewshot_split: test"), "cannot be used"),
        (("task: capitals", "task: piqa"), "calls its task 'piqa', which is another's name"),
        (("task: capitals\n", ""), "has no `task: NAME`"),
        (("multiple_choice", "generate_until"), "has output_type generate_until"),
        (("task:", "task: ["), "cannot be read"),
    ],
    ids=[
        "a subject",
        "no acc",
        "filters",
        "template",
        "field",
        "split",
        "metric",
        "choices",
        "shots",
        "name taken",
        "no name",
        "generates",
        "no YAML",
    ],
)
def test_what_is_no_such_task_is_one_sentence(task: Path, change: tuple[str, str], said: str) -> None:
    task.write_text(task.read_text().replace(*change))
    with pytest.raises(UserError, match=said):
        build_tasks.__wrapped__(spec_of(task))


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        expand_tasks([str(tmp_path / "nowhere.yaml")])


def test_documents_that_are_not_there_are_one_sentence(task: Path) -> None:
    (task.parent / "capitals.jsonl").unlink()
    with pytest.raises(UserError, match="the documents of task 'capitals'"):
        build_tasks.__wrapped__(spec_of(task))
