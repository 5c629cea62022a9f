"""Task names, stock definitions bound to embedded documents, and the choice of documents."""

from __future__ import annotations

import random

import lm_eval.tasks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.group import Group
from lm_eval.tasks.manager import TaskManager

from harness.errors import UserError
from harness.evaluation import tasks
from harness.evaluation.tasks import COMMONSENSE, build_tasks, choose_documents, expand_tasks, known_tasks
from harness.records import EvaluationSpec

EMBEDDED = tuple(name for name in known_tasks() if name not in ("wikitext", "suite"))


def test_commonsense_is_written_out_and_nothing_comes_twice() -> None:
    names, files = expand_tasks(["mmlu", "piqa", "commonsense"])
    assert names == ("mmlu", "piqa", *(t for t in COMMONSENSE if t != "piqa"))
    assert files == ()


@pytest.mark.parametrize(("names", "message"), [(["hellaswga"], "did you mean 'hellaswag'"), ([], "no task was given")])
def test_names_that_cannot_be_used_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand_tasks(names)


def test_the_default_task_manager_with_its_scan_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval.tasks._index.TaskIndex, "build", lambda *_: pytest.fail("scanned"))
    task_set = build_tasks.__wrapped__(EvaluationSpec(tasks=("piqa", "mmlu"), limit=1, mmlu_limit=1))
    assert len(task_set.leaves) == 1 + 57


def test_mmlu_is_the_stock_tree() -> None:
    task_set = build_tasks(EvaluationSpec(tasks=("mmlu",), mmlu_limit=2))
    (group,) = task_set.objects
    assert isinstance(group, Group)
    assert group.child_names == ["mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"]
    assert [len(g.get_all_tasks()) for g in group.get_all_groups()] == [19, 13, 12, 13]
    assert all(a.weight_by_size for g in (group, *group.get_all_groups()) for a in g.aggregate_metric_list)
    assert set(task_set.group_of.values()) == {"mmlu"}
    assert all(len(ids) == 2 for ids in task_set.samples.values())


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_prompts_hold_the_worked_examples(shots: int) -> None:
    task = build_tasks(EvaluationSpec(tasks=("mmlu",), mmlu_num_fewshot=shots)).leaves["mmlu_anatomy"]
    prompt = task.fewshot_context(task.eval_docs[0], shots)
    assert prompt.startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    assert prompt.count("Answer:") == shots + 1
    assert task.config.num_fewshot == shots


def test_bound_tasks_are_lm_evals_own_but_for_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    task_set = build_tasks(EvaluationSpec(tasks=("boolq", "hellaswag", "arc_easy"), limit=3))
    index = TaskManager(
        include_defaults=False,
        include_path=[tasks._tasks_folder() / f for f in ("super_glue/boolq", "hellaswag", "arc")],
    )
    for name in ("boolq", "hellaswag", "arc_easy"):
        stock = index.task_index[name].cfg
        bound = task_set.leaves[name].config
        for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "validation_split"):
            assert getattr(bound, key) == stock.get(key, getattr(bound, key)), (name, key)


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_embedded_task_gives_prompts_and_knows_the_right_choice(name: str) -> None:
    task_set = build_tasks(EvaluationSpec(tasks=(name,), limit=2, mmlu_limit=1, mmlu_num_fewshot=0))
    for leaf, task in task_set.leaves.items():
        for document in task_set.documents(leaf):
            right, chance = task_set.right_choice(leaf, document), task_set.chance(leaf, document)
            if name == "lambada_openai":
                assert right is chance is None
            else:
                assert 0 <= right < len(task.doc_to_choice(document)) == round(1 / chance)


def test_chance_follows_the_number_of_choices() -> None:
    task_set = build_tasks(EvaluationSpec(tasks=("arc_challenge", "social_iqa", "winogrande", "commonsense_qa")))

    def mean(leaf: str) -> float:
        chances = [task_set.chance(leaf, d) for d in task_set.documents(leaf)]
        return sum(chances) / len(chances)

    assert mean("social_iqa") == pytest.approx(1 / 3)
    assert mean("winogrande") == 0.5
    assert mean("commonsense_qa") == pytest.approx(0.2)
    assert 0.25 < mean("arc_challenge") < 0.2505  # a few questions have three choices, one has five


def test_a_task_that_is_not_embedded_points_to_the_hub() -> None:
    with pytest.raises(UserError, match=r"'wikitext' are not embedded; use the hub's"):
        build_tasks(EvaluationSpec(tasks=("wikitext",)))


def test_a_hub_out_of_reach_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"'piqa' \(baber/piqa\) cannot be reached: no route"):
        build_tasks.__wrapped__(EvaluationSpec(tasks=("piqa",), data="hub"))


def test_sciq_says_that_its_split_is_not_the_stock_one() -> None:
    (note,) = build_tasks(EvaluationSpec(tasks=("sciq",), limit=2)).notes
    assert "1,000 validation documents" in note


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 99))
def test_a_larger_limit_keeps_what_a_smaller_one_kept(num_documents: int, limit: int, seed: int) -> None:
    chosen = choose_documents("piqa", num_documents, limit, seed)
    if limit >= num_documents:
        assert chosen is None
        return
    assert chosen == sorted(set(chosen))
    assert len(chosen) == limit
    smaller = choose_documents("piqa", num_documents, max(1, limit // 2), seed)
    assert set(smaller) <= set(chosen)


def test_the_seed_and_the_task_choose_the_documents() -> None:
    chosen = {
        (seed, task): tuple(choose_documents(task, 1000, 20, seed)) for seed in (0, 1) for task in ("piqa", "boolq")
    }
    assert len(set(chosen.values())) == 4
    random.seed(123)
    assert choose_documents("piqa", 1000, 20, 0) == list(chosen[0, "piqa"])
