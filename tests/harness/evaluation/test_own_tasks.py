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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("task: capitals", "task: piqa"), "calls its task 'piqa', which is another's name"),
        (("task: capitals\n", ""), "has no `task: NAME`"),
        (("multiple_choice", "generate_until"), "has output_type generate_until"),
        (("task:", "task: ["), "cannot be read"),
    ],
    ids=["name taken", "no name", "generates", "no YAML"],
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
