"""Synthetic runs: records and per-document scores as a comparison would leave them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.records import (
    CalibrationSpec,
    EvaluationSpec,
    Measure,
    ModelRef,
    ParamCounts,
    Provenance,
    RunRecord,
    RunSpec,
)
from harness.store import Store

COMMONSENSE = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande", "social_iqa")
CHOICES = {"piqa": 2, "winogrande": 2, "social_iqa": 3}
WITHOUT_ACC_NORM = ("winogrande", "social_iqa", "mmlu")
SUBJECTS = ("anatomy", "virology", "astronomy")
DENSE = ParamCounts(total=134_515_008, embedding=28_311_552, attention=26_542_080, mlp=79_626_240, extra=35_136)


def _spec(method: str = "flap", sparsity: float = 0.2, **changes: Any) -> RunSpec:
    known: dict[str, Any] = {
        "model": ModelRef(name="smollm2-135m"),
        "method": method,
        "sparsity": sparsity,
        "calibration": CalibrationSpec(),
        "evaluation": EvaluationSpec(tasks=(*COMMONSENSE, "mmlu"), limit=50, mmlu_limit=4),
    }
    return RunSpec(**(known | changes))


def _documents(spec: RunSpec, p_right: Mapping[str, float] | float = 0.5, num_documents: int = 50) -> pd.DataFrame:
    """Right or wrong answers; how hard a document is does not depend on the method, so runs correlate."""
    lines: list[dict[str, Any]] = []
    answers = np.random.default_rng([3, *spec.method.encode(), round(100 * spec.sparsity), spec.seed])
    for name in spec.evaluation.tasks:
        leaves = [f"{name}_{subject}" for subject in SUBJECTS] if name == "mmlu" else [name]
        for leaf in leaves:
            size = 4 if name == "mmlu" else num_documents
            hardness = np.random.default_rng(sum(leaf.encode())).random(size)
            p = p_right[name] if isinstance(p_right, Mapping) else p_right
            right = 0.7 * hardness + 0.3 * answers.random(size) < p
            for i in range(size):
                choices = CHOICES.get(name, 4)
                lines.append(
                    {
                        "task": leaf,
                        "group": "mmlu" if name == "mmlu" else None,
                        "doc_id": 3 * i,
                        "doc_hash": hashlib.sha256(f"{leaf}/{i}".encode()).hexdigest()[:16],
                        "target": 0,
                        "loglikelihoods": [-1.0 - 0.5 * c for c in range(choices)],
                        "greedy": [False] * choices,
                        "acc": float(right[i]),
                        "acc_norm": None if name in WITHOUT_ACC_NORM else float(right[i]),
                        "margin": 2.0 * float(right[i]) - 1.0,
                        "chance": 1 / choices,
                    }
                )
    return pd.DataFrame(lines)


def _measures(documents: pd.DataFrame) -> tuple[Measure, ...]:
    found = []
    for name, part in documents.groupby(documents["group"].fillna(documents["task"]), sort=False):
        for metric in ("acc", "acc_norm"):
            if part[metric].notna().any():
                value, chance = float(part[metric].mean()), float(part["chance"].mean())
                found.append(
                    Measure(
                        name=f"{name}/{metric}",
                        value=value,
                        unit="fraction",
                        higher_is_better=True,
                        num_examples=len(part),
                        chance=chance,
                    )
                )
    ppl = Measure(name="heldout/ppl_token", value=27.5, unit="perplexity", higher_is_better=False, num_examples=16384)
    return (*found, ppl)


def _record(spec: RunSpec, documents: pd.DataFrame | None = None, **changes: Any) -> RunRecord:
    removed = round(spec.sparsity * DENSE.total)
    after = DENSE.model_copy(update={"total": DENSE.total - removed, "mlp": DENSE.mlp - removed})
    known: dict[str, Any] = {
        "spec": spec,
        "status": "ok",
        "params_before": DENSE,
        "params_after": after,
        "tied_embeddings": True,
        "measures": () if documents is None else _measures(documents),
        "phase_seconds": {"load": 1.0, "prune": 12.25, "evaluate": 60.0},
        "peak_bytes": {"prune": 2 << 30, "evaluate": 3 << 30},
        "provenance": Provenance(
            harness_version="0.1.0",
            commit="0123abc",
            packages={"torch": "2.13.0", "lm-eval": "0.4.13"},
            weights_sha256="ab" * 32,
            calibration_sha256=f"{spec.seed:064x}" if spec.calibration else None,
            data_fingerprints={task: f"of-{task}" for task in spec.evaluation.tasks},
            device="cpu",
            num_threads=2,
            started_utc="2025-01-01T00:00:00Z",
        ),
    }
    return RunRecord(**(known | changes))


@pytest.fixture
def make_spec() -> Callable[..., RunSpec]:
    """``make_spec(method, sparsity, **fields)``."""
    return _spec


@pytest.fixture
def make_documents() -> Callable[..., pd.DataFrame]:
    """``make_documents(spec, p_right, num_documents)``: 50 per task and 3 x 4 of MMLU."""
    return _documents


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    """``make_record(spec, documents, **fields)``."""
    return _record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty results folder."""
    return Store(tmp_path / "results")


@pytest.fixture
def add_run(store: Store) -> Callable[..., RunRecord]:
    """``add_run(method, sparsity, p_right, **fields of the spec)`` stores an ok run with documents."""

    def add(method: str, sparsity: float, p_right: Mapping[str, float] | float = 0.5, **changes: Any) -> RunRecord:
        spec = _spec(method, sparsity, **changes)
        documents = _documents(spec, p_right)
        record = _record(spec, documents)
        store.write(record, documents)
        return record

    return add


@pytest.fixture
def put() -> Callable[[Store, str, float], RunRecord]:
    """``put(store, method, p_right)`` stores a run whose answers are right that often."""

    def put(store: Store, method: str, p_right: float) -> RunRecord:
        spec = _spec(method)
        documents = _documents(spec, p_right)
        record = _record(spec, documents)
        store.write(record, documents)
        return record

    return put
