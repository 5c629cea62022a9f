"""The table against numbers worked out by another route, and what must never be mixed or left out."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from harness import run_files, statistics
from harness.errors import UserError
from harness.records import CalibrationSpec, EvaluationSpec, Measure, ModelRef, RunRecord, RunSpec, TrainingSpec
from harness.report import build_leaderboard
from harness.store import Store

Make = Callable[..., RunRecord]
MakeSpec = Callable[..., RunSpec]
MakeDocuments = Callable[..., pd.DataFrame]

COMMONSENSE = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande", "social_iqa")
REQUIRED = [
    "model", "method", "target_sparsity", "basis", "sparsity_total", "sparsity_non_embedding", "params_total", "status",
    "seeds", *COMMONSENSE, "commonsense_avg", "commonsense_ci_low", "commonsense_ci_high", "delta_vs_dense", "mmlu",
    "ppl_token", "prune_seconds", "prune_peak_bytes", "eval_seconds", "run_ids",
]  # fmt: skip


@pytest.fixture
def compared(store: Store, add_run: Make, make_spec: MakeSpec) -> Store:
    """Dense, two good methods that are close, a bad one, one that failed and one that is unsupported."""
    add_run("dense", 0.0, 0.55, calibration=None)
    add_run("flap", 0.2, 0.50)
    add_run("slicegpt", 0.2, 0.49)
    add_run("random", 0.2, 0.25)
    spec = make_spec("llm-pruner", 0.2)
    store.write(RunRecord(spec=spec, status="failed", reason="ended at 9 parameters, the target being 8."))
    store.write(RunRecord(spec=make_spec("adapt-pruner", 0.2), status="unsupported", reason="no gate projections"))
    return store


def _row(frame: pd.DataFrame, method: str, **where: object) -> pd.Series:
    chosen = frame[frame["method"] == method]
    for name, value in where.items():
        chosen = chosen[chosen[name] == value]
    assert len(chosen) == 1
    return chosen.iloc[0]


def _scores(store: Store, run_id: str) -> dict[str, np.ndarray]:
    """Task -> primary metric, read without the code under test."""
    documents = store.documents(run_id)
    assert documents is not None
    documents = documents[documents["group"].isna()]
    primary = documents["acc_norm"].fillna(documents["acc"])
    return {str(task): part.to_numpy() for task, part in primary.groupby(documents["task"])}


def test_csv_begins_with_the_agreed_columns_in_the_agreed_order(compared: Store, tmp_path: Path) -> None:
    build_leaderboard(compared).to_csv(tmp_path / "leaderboard.csv")
    read = pd.read_csv(tmp_path / "leaderboard.csv")
    assert list(read.columns[: len(REQUIRED)]) == REQUIRED
    assert read["method"].tolist() == ["chance", "dense", "flap", "slicegpt", "random", "adapt-pruner", "llm-pruner"]
    assert read["params_total"].dropna().tolist() == [134515008, 107612006, 107612006, 107612006]


def test_average_is_the_mean_of_task_means_and_delta_is_paired_with_dense(compared: Store) -> None:
    frame = build_leaderboard(compared).frame
    flap, dense = _row(frame, "flap"), _row(frame, "dense")
    scores, reference = _scores(compared, flap["run_ids"]), _scores(compared, dense["run_ids"])
    assert flap["commonsense_avg"] == pytest.approx(np.mean([scores[task].mean() for task in COMMONSENSE]))
    assert flap["winogrande"] == pytest.approx(scores["winogrande"].mean())
    expected = statistics.paired_bootstrap(scores, reference)
    assert flap["delta_vs_dense"] == pytest.approx(expected.value)
    assert (flap["delta_ci_low"], flap["delta_ci_high"]) == pytest.approx(expected.interval)
    assert flap["delta_p"] == expected.p_value
    alone = statistics.percentile_interval(statistics.resampled_average(scores)[:, 0])
    assert (flap["commonsense_ci_low"], flap["commonsense_ci_high"]) == pytest.approx(alone)
    assert np.isnan(dense["delta_vs_dense"])


def test_mmlu_is_weighted_by_documents_over_subjects(
    store: Store, make_spec: MakeSpec, make_documents: MakeDocuments, make_record: Make
) -> None:
    spec = make_spec()
    documents = make_documents(spec)
    # One subject of 4, all right; two of 2 and 4, all wrong: 4 / 10, not the mean over subjects 1 / 3.
    documents = documents[~((documents["task"] == "mmlu_virology") & (documents["doc_id"] > 3))]
    documents.loc[documents["group"] == "mmlu", "acc"] = 0.0
    documents.loc[documents["task"] == "mmlu_anatomy", "acc"] = 1.0
    store.write(make_record(spec, documents), documents)
    row = _row(build_leaderboard(store).frame, "flap")
    assert row["mmlu"] == pytest.approx(0.4)
    # Pooled resampling of 10 documents: standard error sqrt(0.24 / 10).
    assert row["mmlu_ci_high"] - row["mmlu_ci_low"] == pytest.approx(2 * 1.96 * 0.024**0.5, abs=0.05)


def test_best_is_marked_and_so_is_what_is_not_significantly_worse(compared: Store) -> None:
    frame = build_leaderboard(compared).frame
    marks = {row["method"]: row["best_or_tied"] for _, row in frame.iterrows()}
    assert marks["flap"] == "best"
    assert marks["slicegpt"] == "tied"
    for method in ("random", "dense", "chance", "llm-pruner"):
        assert pd.isna(marks[method])
    best, tied, worse = (_scores(compared, _row(frame, m)["run_ids"]) for m in ("flap", "slicegpt", "random"))
    raw = [statistics.paired_bootstrap(best, other).p_value for other in (tied, worse)]
    found = [_row(frame, "slicegpt")["p_vs_best"], _row(frame, "random")["p_vs_best"]]
    assert found == pytest.approx(statistics.holm(raw))


def test_a_failed_run_stands_without_scores_whatever_it_measured(
    compared: Store, make_spec: MakeSpec, make_documents: MakeDocuments, make_record: Make
) -> None:
    spec = make_spec("magnitude", 0.2, calibration=None)
    documents = make_documents(spec, 0.99)
    compared.write(make_record(spec, documents, status="failed", reason="missed its target"), documents)
    leaderboard = build_leaderboard(compared)
    row = _row(leaderboard.frame, "magnitude")
    assert row[[*COMMONSENSE, "commonsense_avg", "mmlu", "ppl_token", "best_or_tied"]].isna().all()
    assert (row["status"], row["reason"]) == ("failed", "missed its target")
    assert leaderboard.exit_code == 1
    assert "magnitude failed at 20%: missed its target." in leaderboard.notes


def test_unsupported_alone_is_not_a_failure(store: Store, make_spec: MakeSpec) -> None:
    store.write(RunRecord(spec=make_spec(), status="unsupported", reason="no gate projections"))
    leaderboard = build_leaderboard(store)
    assert leaderboard.exit_code == 0
    assert "| unsupported |" in " ".join(leaderboard.to_markdown().split())
    assert any("flap unsupported at 20%: no gate projections." in note for note in leaderboard.notes)


def test_chance_stands_in_the_table_with_where_guessers_land(compared: Store) -> None:
    chance = _row(build_leaderboard(compared).frame, "chance")
    levels = chance[["arc_easy", "piqa", "social_iqa", "mmlu"]].tolist()
    assert levels == pytest.approx([0.25, 0.5, 1 / 3, 0.25])
    average = (4 * 0.25 + 2 * 0.5 + 1 / 3) / 7
    half = 1.959964 * ((4 * 3 / 16 + 2 / 4 + 2 / 9) / 50) ** 0.5 / 7
    assert chance["commonsense_avg"] == pytest.approx(average)
    assert (chance["commonsense_ci_low"], chance["commonsense_ci_high"]) == pytest.approx(
        (average - half, average + half)
    )


def test_an_average_over_fewer_tasks_says_which(store: Store, add_run: Make) -> None:
    add_run("flap", 0.2, 0.5, evaluation=EvaluationSpec(tasks=("piqa", "arc_easy"), limit=50))
    leaderboard = build_leaderboard(store)
    assert leaderboard.frame["commonsense_tasks"].dropna().tolist() == [2]
    assert any("mean over arc_easy, piqa (only 2 of the 7" in note for note in leaderboard.notes)
    assert list(leaderboard.frame.columns[9:12]) == ["piqa", "arc_easy", "commonsense_avg"]


def test_without_per_document_scores_there_is_no_average(
    store: Store, make_spec: MakeSpec, make_documents: MakeDocuments, make_record: Make
) -> None:
    spec = make_spec()
    store.write(make_record(spec, make_documents(spec)))
    leaderboard = build_leaderboard(store)
    row = _row(leaderboard.frame, "flap")
    assert np.isnan(row["commonsense_avg"])
    assert 0 <= row["piqa"] <= 1
    assert any("No per-document scores are stored for flap at 20%" in note for note in leaderboard.notes)


def test_seeds_make_one_row_with_mean_and_spread(store: Store, add_run: Make) -> None:
    add_run("dense", 0.0, 0.55, calibration=None)
    records = [add_run("flap", 0.2, p, seed=seed) for seed, p in enumerate((0.4, 0.5, 0.6))]
    leaderboard = build_leaderboard(store)
    row = _row(leaderboard.frame, "flap")
    averages = [
        np.mean([scores.mean() for scores in _scores(store, record.spec.run_id).values()]) for record in records
    ]
    assert (row["seeds"], row["seed_values"]) == (3, "0 1 2")
    assert row["run_ids"].split() == [record.spec.run_id for record in records]
    assert row["commonsense_avg"] == pytest.approx(np.mean(averages))
    assert row["commonsense_spread"] == pytest.approx(np.std(averages, ddof=1))
    width = row["commonsense_ci_high"] - row["commonsense_ci_low"]
    one_seed = statistics.resampled_average(_scores(store, records[1].spec.run_id))[:, 0]
    low, high = statistics.percentile_interval(one_seed)
    assert width > 1.2 * (high - low)
    assert any(note.startswith("Each seed draws its own calibration") for note in leaderboard.notes)


def test_one_seed_is_said_not_to_cover_calibration_noise(compared: Store) -> None:
    assert any(
        note.startswith("One seed: the noise of the calibration draw") for note in build_leaderboard(compared).notes
    )


def test_a_seed_that_failed_gets_a_row_of_its_own(store: Store, add_run: Make, make_spec: MakeSpec) -> None:
    add_run("flap", 0.2, 0.5, seed=0)
    store.write(RunRecord(spec=make_spec("flap", 0.2, seed=1), status="failed", reason="killed"))
    frame = build_leaderboard(store).frame
    assert frame[frame["method"] == "flap"]["status"].tolist() == ["ok", "failed"]
    assert frame[frame["method"] == "flap"]["seeds"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "told_apart"),
    [
        ({"method_params": {"metric": "wifn"}}, "metric=wifn"),
        ({"method_params": {"dtype": "int8"}}, "method_params.dtype=int8"),
        ({"calibration": CalibrationSpec(num_samples=128)}, "calibration.num_samples=128"),
        ({"evaluation": EvaluationSpec(tasks=COMMONSENSE, limit=40)}, "evaluation.limit=40"),
        ({"dtype": "bfloat16"}, "dtype=bfloat16"),
    ],
)
def test_runs_with_other_settings_are_never_mixed(
    store: Store, add_run: Make, changes: dict[str, object], told_apart: str
) -> None:
    add_run("flap", 0.2, 0.5)
    add_run("flap", 0.2, 0.5, seed=1, **changes)
    frame = build_leaderboard(store).frame
    flap = frame[frame["method"] == "flap"]
    assert flap["seeds"].tolist() == [1, 1]
    assert sum(told_apart in settings for settings in flap["settings"]) == 1
    assert flap["settings"].nunique() == 2


def test_bfloat16_rows_stand_in_a_table_of_their_own(store: Store, add_run: Make) -> None:
    for dtype in ("bfloat16", "float32"):
        add_run("dense", 0.0, 0.55, calibration=None, dtype=dtype)
        add_run("flap", 0.2, 0.5, dtype=dtype)
    leaderboard = build_leaderboard(store)
    assert [section.heading for section in leaderboard.sections] == ["Weights in float32", "Weights in bfloat16"]
    markdown = leaderboard.to_markdown()
    first, second = markdown.split("## Weights in bfloat16")
    assert "## Weights in float32" in first
    for table in (first, second):
        assert [table.count(f"| {name}") for name in ("chance", "dense", "**flap")] == [1, 1, 1]
    frame = leaderboard.frame.dropna(subset="dtype")
    assert frame["dtype"].tolist() == ["float32"] * 2 + ["bfloat16"] * 2
    # Each is best of its own contest, and measured against the dense model in its own precision.
    assert frame[frame["method"] == "flap"]["best_or_tied"].tolist() == ["best", "best"]


def test_of_equal_averages_the_first_name_is_best_whatever_order_they_are_read_in(
    store: Store, make_spec: MakeSpec, make_documents: MakeDocuments, make_record: Make
) -> None:
    documents = make_documents(make_spec("flap"))
    records = [make_record(make_spec(method), documents) for method in ("slicegpt", "flap")]
    for record in records:
        store.write(record, documents)
    for order in (records, records[::-1]):
        frame = build_leaderboard(store, [record.spec.run_id for record in order]).frame
        assert frame.dropna(subset="model")["best_or_tied"].tolist() == ["best", "tied"]
        assert frame.dropna(subset="model")["method"].tolist() == ["flap", "slicegpt"]


def test_margins_are_averaged_like_the_scores_and_paired_with_dense(store: Store, add_run: Make) -> None:
    add_run("dense", 0.0, 0.55, calibration=None)
    add_run("flap", 0.2, 0.5)
    frame = build_leaderboard(store).frame
    flap, dense = _row(frame, "flap"), _row(frame, "dense")
    # The synthetic margin is +1 for a right answer and -1 for a wrong one.
    assert flap["margin"] == pytest.approx(2 * flap["commonsense_avg"] - 1)
    assert flap["margin_ci_low"] == pytest.approx(2 * flap["commonsense_ci_low"] - 1)
    assert flap["margin_delta"] == pytest.approx(flap["margin"] - dense["margin"])
    assert flap["margin_delta_ci_high"] == pytest.approx(2 * flap["delta_ci_high"])
    assert np.isnan(dense["margin_delta"])


def test_runs_from_before_there_were_margins_still_read(
    store: Store, make_spec: MakeSpec, make_documents: MakeDocuments, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    documents = make_documents(spec).drop(columns="margin")
    with monkeypatch.context() as before:
        before.delitem(run_files.DOCUMENT_TYPES, "margin")
        store.write(make_record(spec, documents), documents)
    leaderboard = build_leaderboard(store)
    flap = _row(leaderboard.frame, "flap")
    assert flap["commonsense_avg"] > 0
    assert np.isnan(flap["margin"])
    assert "margin" not in leaderboard.to_markdown()


def test_the_divergence_has_an_interval_over_windows_and_seeds(
    store: Store, make_spec: MakeSpec, make_documents: MakeDocuments, make_record: Make
) -> None:
    for seed, value in ((0, 0.20), (1, 0.24)):
        spec = make_spec(seed=seed)
        kl = Measure(
            name="heldout/kl_dense", value=value, unit="nats/token", higher_is_better=False, stderr=0.03, num_examples=9
        )
        store.write(make_record(spec, None, measures=(kl,)), make_documents(spec))
    flap = _row(build_leaderboard(store).frame, "flap")
    half = 1.959964 * (0.03**2 + 0.04**2 / 4) ** 0.5  # two values 0.04 apart: variance 0.0008, over two seeds
    assert flap["kl_dense"] == pytest.approx(0.22)
    assert (flap["kl_dense_ci_low"], flap["kl_dense_ci_high"]) == pytest.approx((0.22 - half, 0.22 + half), rel=1e-5)


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"model": ModelRef(name="other")},
                                     {"evaluation": EvaluationSpec(tasks=COMMONSENSE, limit=50)}])  # fmt: skip
def test_only_dense_of_the_same_model_precision_and_evaluation_is_subtracted(
    store: Store, add_run: Make, changes: dict[str, object]
) -> None:
    add_run("dense", 0.0, 0.55, calibration=None, **changes)
    add_run("flap", 0.2, 0.5)
    assert np.isnan(_row(build_leaderboard(store).frame, "flap")["delta_vs_dense"])


def test_other_weights_under_the_same_name_are_not_compared(
    store: Store, add_run: Make, make_spec: MakeSpec, make_documents: MakeDocuments, make_record: Make
) -> None:
    add_run("dense", 0.0, 0.55, calibration=None)
    dense = next(iter(store.records())).provenance
    assert dense is not None
    spec = make_spec()
    documents = make_documents(spec)
    changed = dense.model_copy(update={"weights_sha256": "cd" * 32})
    store.write(make_record(spec, documents, provenance=changed), documents)
    leaderboard = build_leaderboard(store)
    assert np.isnan(_row(leaderboard.frame, "flap")["delta_vs_dense"])
    assert sum("weights sha256" in note for note in leaderboard.notes) == 2


def test_scores_on_different_documents_are_refused(
    store: Store, add_run: Make, make_spec: MakeSpec, make_documents: MakeDocuments, make_record: Make
) -> None:
    add_run("slicegpt", 0.2)
    spec = make_spec()
    documents = make_documents(spec)
    documents.loc[3, "doc_hash"] = "another question"
    store.write(make_record(spec, documents), documents)
    with pytest.raises(UserError, match="scores of different documents"):
        build_leaderboard(store)


def test_the_order_of_stored_documents_does_not_matter(compared: Store, make_documents: MakeDocuments) -> None:
    before = build_leaderboard(compared).frame
    record = compared.load(_row(before, "flap")["run_ids"])
    documents = compared.documents(record.spec.run_id)
    assert documents is not None
    compared.write(record, documents.sample(frac=1, random_state=3))
    pd.testing.assert_frame_equal(build_leaderboard(compared).frame, before)


def test_only_the_runs_asked_for_are_shown(compared: Store) -> None:
    wanted = [run_id for run_id in compared.run_ids() if "--flap--" in run_id or "--dense--" in run_id]
    assert build_leaderboard(compared, wanted).frame["method"].tolist() == ["chance", "dense", "flap"]


def test_rows_are_sorted_by_model_sparsity_and_falling_average(store: Store, add_run: Make) -> None:
    for model in ("b-model", "a-model"):
        for sparsity in (0.4, 0.2):
            for method, p in (("flap", 0.3), ("random", 0.6)):
                add_run(method, sparsity, p, model=ModelRef(name=model))
    frame = build_leaderboard(store).frame.iloc[1:]
    assert frame["model"].tolist() == ["a-model"] * 4 + ["b-model"] * 4
    assert frame["target_sparsity"].tolist() == [0.2, 0.2, 0.4, 0.4] * 2
    assert frame["method"].tolist() == ["random", "flap"] * 4


def test_markdown_shows_percent_intervals_marks_and_notes(compared: Store) -> None:
    leaderboard = build_leaderboard(compared, command="harness compare --methods all")
    text = leaderboard.to_markdown()
    flap, slicegpt = _row(leaderboard.frame, "flap"), _row(leaderboard.frame, "slicegpt")

    def shown(row: pd.Series) -> str:
        low, high = 100 * row["commonsense_ci_low"], 100 * row["commonsense_ci_high"]
        return f"{100 * row['commonsense_avg']:.1f} [{low:.1f}, {high:.1f}]"

    assert f"**{shown(flap)}**" in text
    assert "**flap**" in text
    assert f"{shown(slicegpt)} †" in text
    assert "ppl/token (512-token windows)" in text
    assert "107.6" in text
    for note in (
        "weights sha256 abababababab",
        "wikipedia, 64 x 128 tokens",
        "50 of arc_easy, arc_challenge",
        "12 of MMLU (4 a subject, 5-shot)",
        "torch 2.13.0",
        "To reproduce: `harness compare --methods all`.",
        "llm-pruner failed at 20%: ended at 9 parameters, the target being 8.",
    ):
        assert note in text


def test_a_record_note_stands_once(
    store: Store, make_spec: MakeSpec, make_documents: MakeDocuments, make_record: Make
) -> None:
    for method, own in (
        ("flap", ("3 contexts were truncated", "head skipped")),
        ("random", ("3 contexts were truncated",)),
    ):
        spec = make_spec(method)
        documents = make_documents(spec)
        store.write(make_record(spec, documents, notes=own), documents)
    notes = build_leaderboard(store).notes
    assert notes.count("3 contexts were truncated") == 1
    assert "flap: head skipped" in notes


@pytest.mark.parametrize("width", [80, 120, 400])
def test_the_terminal_shows_every_cell_of_the_markdown_at_any_width(compared: Store, width: int) -> None:
    leaderboard = build_leaderboard(compared)
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(leaderboard.to_rich())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    for column in leaderboard.sections[0].columns:
        for cell in column.cells:
            for word in cell.text.replace(", ", ",").split():
                assert word in text, text
    assert text.count("dense  ") >= (1 if width == 400 else 3)


def test_an_empty_folder_is_a_sentence(store: Store) -> None:
    with pytest.raises(UserError, match=r"no runs in .*harness compare"):
        build_leaderboard(store)


def test_the_default_comparison_builds_in_two_seconds(store: Store, add_run: Make) -> None:
    add_run("dense", 0.0, 0.55, calibration=None)
    for sparsity in (0.2, 0.4):
        for method in ("adapt-pruner", "llm-pruner", "flap", "slicegpt", "random", "magnitude"):
            add_run(method, sparsity, 0.5 - sparsity / 4)
    started = time.process_time()
    leaderboard = build_leaderboard(store)
    assert len(leaderboard.frame) == 14
    assert time.process_time() - started < 2


def test_reports_import_neither_torch_nor_transformers_nor_lm_eval() -> None:
    code = "import sys, harness.report, harness.store, harness.statistics; print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"  # noqa: E501
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_trained_models_stand_in_tables_of_their_own_and_compete_there(store: Store, add_run: Make) -> None:
    add_run("dense", 0.0, 0.55, calibration=None)
    for recovery in (None, TrainingSpec(tokens=9000, mode="lora"), TrainingSpec(tokens=9000)):
        add_run("flap", 0.2, 0.50, recovery=recovery)
        for seed in (0, 1):
            trained = recovery.model_copy(update={"seed": seed}) if recovery else None
            add_run("random", 0.2, 0.25, seed=seed, recovery=trained)
    leaderboard = build_leaderboard(store)
    assert [section.heading for section in leaderboard.sections] == [
        "Without training",
        "Full training on 9,000 tokens of reading, rate 2e-05",
        "Low-rank training (rank 8) on 9,000 tokens of reading, rate 2e-05",
    ]
    frame = leaderboard.frame[leaderboard.frame["method"].isin(["flap", "random"])]
    assert frame.groupby("recovery").size().to_dict() == {"none": 2, "full": 2, "lora": 2}
    assert set(frame.loc[frame["method"] == "random", "seeds"]) == {2}
    assert set(frame.loc[frame["method"] == "flap", "best_or_tied"]) == {"best"}
    assert frame["delta_vs_dense"].notna().all()
    assert frame["settings"].isna().all()
    assert set(frame.loc[frame["recovery"] != "none", "recovery_tokens"]) == {9000}
