"""Verdicts on records whose answers are known, and what is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from harness.errors import UserError
from harness.records import CalibrationSpec, Measure, RunRecord, RunSpec
from harness.regression import Limits, Regression, headline, regress
from harness.regression.evidence import FAMILIES
from harness.regression.judge import Check
from harness.run_files import DOCUMENT_TYPES
from harness.store import Store

COMMITTED = Path(__file__).parents[3] / "results" / "reference"
Add = Callable[..., tuple[RunRecord, RunRecord]]


def checks(found: Regression, name: str) -> list[Check]:
    return [check for run in found.runs for check in run.checks if check.name == name]


def test_the_committed_reference_passes_against_itself() -> None:
    found = regress(Store(COMMITTED), Store(COMMITTED), Limits())
    assert found.verdict == "pass"
    assert found.exit_code == 0
    assert all(run.evidence is not None and run.evidence.average.value == 0 for run in found.runs)


def test_a_real_drop_in_one_run_fails_that_run_alone(tmp_path: Path) -> None:
    for run in sorted((COMMITTED / "runs").iterdir()):
        if "--flap--" in run.name or "--dense--" in run.name:
            shutil.copytree(run, tmp_path / "runs" / run.name)
    candidate = Store(tmp_path)
    broken = next(record for record in candidate.records() if record.spec.method == "flap")
    documents = candidate.documents(broken.spec.run_id)
    assert documents is not None
    for task in ("arc_easy", "piqa", "winogrande", "social_iqa", "openbookqa"):
        part = documents[documents["task"] == task]
        metric = "acc_norm" if part["acc_norm"].notna().all() else "acc"
        documents.loc[part.index[part[metric] == 1][:8], metric] = 0.0
    documents = documents.reindex(columns=list(DOCUMENT_TYPES))  # of an older version than some columns
    candidate.write(broken, documents)
    found = regress(Store(COMMITTED), candidate, Limits())
    assert {run.run_id: run.verdict for run in found.runs}[broken.spec.run_id] == "fail"
    assert [run.verdict for run in found.runs].count("fail") == 1
    assert found.exit_code == 1
    assert len(found.only_reference) == 13 - len(found.runs)


def test_a_few_lost_answers_cannot_tell_and_say_how_many_documents_would(
    store: Store, candidate: Store, add_pair: Add
) -> None:
    """350 documents, 3 lost: by hand, the average drops 6/7 of a point, and excluding 1 point needs more."""
    add_pair(lose={"piqa": 2, "arc_easy": 1})
    found = regress(store, candidate, Limits(1.0))
    (check,) = checks(found, "accuracy")
    evidence = found.runs[0].evidence
    assert check.verdict == "cannot tell"
    assert evidence is not None
    assert evidence.average.value == pytest.approx(-3 / 350)
    # The share of answers that differ, 3/350, is below 1%, which a drop of 1 point would need at least.
    critical, noise = stats.norm.ppf(0.95) * (0.01 - 0.01**2) ** 0.5, stats.norm.ppf(0.8) * (3 / 350) ** 0.5
    assert evidence.average.num_needed == math.ceil(((critical + noise) / 0.01) ** 2)
    assert f"{evidence.average.num_needed:,} documents" in check.text
    assert found.exit_code == 3


def test_a_larger_tolerance_passes_the_same_answers(store: Store, candidate: Store, add_pair: Add) -> None:
    add_pair(lose={"piqa": 2, "arc_easy": 1})
    assert regress(store, candidate, Limits(3.0)).verdict == "pass"


def test_a_single_task_fails_by_mcnemars_test(store: Store, candidate: Store, add_pair: Add) -> None:
    add_pair("random", 0.2)
    add_pair("flap", 0.2, lose={"hellaswag": 12})
    found = regress(store, candidate, Limits(5.0))
    (check,) = checks(found, "hellaswag")
    assert check.verdict == "fail"
    tasks = [task for run in found.runs if run.evidence for task in run.evidence.tasks]
    assert len(tasks) == 16
    worst = min(tasks, key=lambda task: task.p_worse)
    assert worst.p_worse == pytest.approx(0.5**12)
    assert worst.p_worse_holm == pytest.approx(FAMILIES * 16 * 0.5**12)
    # The average drops 12/350, less than the five points allowed: the run fails for the task alone.
    assert not [check for check in checks(found, "accuracy") if check.verdict == "fail"]


def test_recovery_is_judged_against_the_candidates_own_dense_run(store: Store, candidate: Store, add_pair: Add) -> None:
    add_pair("dense", 0.0)
    add_pair("flap", 0.2)
    with_dense = regress(store, candidate, Limits(3.0, min_recovery=0.5))
    (check,) = checks(with_dense, "recovery")
    assert check.verdict == "pass"
    shutil.rmtree(next(candidate.runs.glob("*--dense--*")))
    with pytest.raises(UserError, match=r"--min-recovery needs the dense run of smollm2-135m"):
        regress(store, candidate, Limits(3.0, min_recovery=0.5))


def test_recovery_that_is_lost_fails(store: Store, candidate: Store, add_pair: Add) -> None:
    add_pair("dense", 0.0)
    tasks = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande", "social_iqa")
    add_pair("flap", 0.2, lose=dict.fromkeys(tasks, 15))
    (check,) = checks(regress(store, candidate, Limits(3.0, min_recovery=0.95)), "recovery")
    assert check.verdict == "fail"


def test_bounds_hold_to_the_number(store: Store, candidate: Store, add_pair: Add) -> None:
    before, _ = add_pair()
    grown = before.params_after.model_copy(update={"total": before.params_after.total + 1})  # type: ignore[union-attr]
    ppl = Measure(name="heldout/ppl_token", value=27.5 * math.exp(0.02), unit="perplexity", higher_is_better=False)
    others = tuple(measure for measure in before.measures if not measure.name.startswith("heldout"))
    add_pair(params_after=grown, phase_seconds={"prune": 24.5}, measures=(*others, ppl))

    def verdict(name: str, limits: Limits) -> str:
        (check,) = checks(regress(store, candidate, limits), name)
        return check.verdict

    assert verdict("loss", Limits(3.0, max_loss_increase=0.0201)) == "pass"
    assert verdict("loss", Limits(3.0, max_loss_increase=0.0199)) == "fail"
    assert verdict("parameters", Limits(3.0, max_params_ratio=1.0)) == "fail"
    assert verdict("parameters", Limits(3.0, max_params_ratio=1.001)) == "pass"
    assert verdict("pruning time", Limits(3.0, max_time_ratio=1.99)) == "fail"
    assert verdict("pruning time", Limits(3.0, max_time_ratio=2.0)) == "pass"
    unlimited = regress(store, candidate, Limits(3.0))
    assert [check.name for run in unlimited.runs for check in run.checks] == ["accuracy"]


def test_a_bound_on_what_was_not_measured_cannot_tell(store: Store, candidate: Store, add_pair: Add) -> None:
    add_pair(measures=())
    found = regress(store, candidate, Limits(3.0, max_loss_increase=0.1))
    assert [check.verdict for check in checks(found, "loss")] == ["cannot tell"]


def test_a_run_that_failed_in_the_candidate_fails(
    store: Store, candidate: Store, add_pair: Add, make_record: Callable[..., RunRecord]
) -> None:
    before, _ = add_pair()
    candidate.write(make_record(before.spec, status="failed", reason="not finite", measures=()))
    (check,) = checks(regress(store, candidate, Limits()), "run")
    assert check.verdict == "fail"
    assert "not finite" in check.text


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"packages": {"torch": "2.14.0"}}, "version of torch: 2.13.0 in the reference, 2.14.0"),
        ({"data_fingerprints": {"piqa": "other"}}, "documents of piqa: of-piqa in the reference, other"),
        ({"calibration_sha256": "f" * 64}, "calibration tokens: 000000000000 in the reference, ffffffffffff"),
        ({"weights_sha256": "cd" * 32}, "weights: abababababab in the reference, cdcdcdcdcdcd"),
    ],
)
def test_what_else_differs_is_refused_by_name_or_noted_loudly(
    changed: dict[str, object], named: str, store: Store, candidate: Store, add_pair: Add
) -> None:
    before, _ = add_pair()
    assert before.provenance is not None
    (field, value), *_ = changed.items()
    update = {**getattr(before.provenance, field), **value} if isinstance(value, dict) else value
    add_pair(provenance=before.provenance.model_copy(update={field: update}))
    with pytest.raises(UserError, match="differ in more than the code") as refused:
        regress(store, candidate, Limits())
    assert named in str(refused.value)
    found = regress(store, candidate, Limits(3.0), allow_different=True)
    assert found.verdict == "pass"
    assert any(named in difference for difference in found.differences)


def test_other_settings_match_by_method_and_seed_and_are_named(
    store: Store,
    candidate: Store,
    make_spec: Callable[..., RunSpec],
    make_documents: Callable[..., pd.DataFrame],
    make_record: Callable[..., RunRecord],
) -> None:
    ours = make_spec("flap", 0.2)
    theirs = make_spec("flap", 0.2, calibration=CalibrationSpec(num_samples=32))
    documents = make_documents(ours)
    store.write(make_record(ours, documents), documents)
    candidate.write(make_record(theirs, documents), documents)
    with pytest.raises(UserError, match=r"calibration\.num_samples: 64 in the reference, 32 in the candidate"):
        regress(store, candidate, Limits())
    assert regress(store, candidate, Limits(3.0), allow_different=True).verdict == "pass"


def test_tasks_on_other_documents_are_never_paired(store: Store, candidate: Store, add_pair: Add) -> None:
    _, after = add_pair()
    documents = candidate.documents(after.spec.run_id)
    assert documents is not None
    documents.loc[documents["task"] == "piqa", "doc_hash"] = "another"
    candidate.write(after, documents)
    with pytest.raises(UserError, match="documents of piqa: other ones in the candidate"):
        regress(store, candidate, Limits())
    (run,) = regress(store, candidate, Limits(3.0), allow_different=True).runs
    assert run.evidence is not None
    assert "piqa" not in run.evidence.averaged
    assert run.evidence.average.num_documents == 300


def test_the_order_of_the_documents_does_not_matter(store: Store, candidate: Store, add_pair: Add) -> None:
    _, after = add_pair(lose={"piqa": 2})
    documents = candidate.documents(after.spec.run_id)
    assert documents is not None
    before = regress(store, candidate, Limits())
    candidate.write(after, documents.sample(frac=1, random_state=1, ignore_index=True))
    assert regress(store, candidate, Limits()).runs == before.runs


def test_two_equally_good_counterparts_are_refused(
    store: Store,
    candidate: Store,
    make_spec: Callable[..., RunSpec],
    make_record: Callable[..., RunRecord],
) -> None:
    store.write(make_record(make_spec("flap", 0.2)))
    for samples in (16, 32):
        candidate.write(make_record(make_spec("flap", 0.2, calibration=CalibrationSpec(num_samples=samples))))
    with pytest.raises(UserError, match="equally well"):
        regress(store, candidate, Limits())


def test_leftover_runs_are_paired_by_the_fewest_differences_of_all(
    store: Store,
    candidate: Store,
    make_spec: Callable[..., RunSpec],
    make_record: Callable[..., RunRecord],
) -> None:
    few, many = CalibrationSpec(num_samples=16), CalibrationSpec(num_samples=32)
    store.write(make_record(make_spec("flap", 0.2, calibration=few)))
    other = make_record(make_spec("flap", 0.2, calibration=many))
    store.write(other)
    candidate.write(make_record(make_spec("flap", 0.2, calibration=many, round_to=8)))
    found = regress(store, candidate, Limits(), allow_different=True)
    assert [run.run_id for run in found.runs] == [other.spec.run_id]
    assert [text.partition(":")[0] for text in found.runs[0].pair.differences] == ["round_to"]


def test_runs_that_the_candidate_lacks_are_told_and_may_be_refused(
    store: Store, candidate: Store, add_pair: Add
) -> None:
    add_pair("dense", 0.0)
    missing, _ = add_pair("flap", 0.2)
    shutil.rmtree(candidate.folder(missing.spec.run_id))
    found = regress(store, candidate, Limits(3.0))
    assert "1 of the reference are not in the candidate" in headline(found)
    with pytest.raises(UserError, match=f"lacks runs of the reference: {missing.spec.run_id}; make them"):
        regress(store, candidate, Limits(3.0), require_all=True)


def test_the_build_of_a_version_is_no_difference(store: Store, candidate: Store, add_pair: Add) -> None:
    before, _ = add_pair()
    assert before.provenance is not None

    def with_torch(version: str) -> Regression:
        packages = before.provenance.packages | {"torch": version}  # type: ignore[union-attr]
        add_pair(provenance=before.provenance.model_copy(update={"packages": packages}))  # type: ignore[union-attr]
        return regress(store, candidate, Limits(3.0))

    version = before.provenance.packages["torch"].partition("+")[0]
    assert with_torch(version).differences == with_torch(f"{version}+cu130").differences == ()
    with pytest.raises(UserError, match="version of torch"):
        with_torch("1.0.0")


def test_an_empty_or_unrelated_folder_is_one_sentence(store: Store, candidate: Store, add_pair: Add) -> None:
    with pytest.raises(UserError, match="has no runs"):
        regress(store, candidate, Limits())


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("tolerance", 0.0),
        ("tolerance", -1.0),
        ("tolerance", math.nan),
        ("min_recovery", 1.5),
        ("max_loss_increase", -0.1),
        ("max_params_ratio", 0.0),
        ("max_time_ratio", math.inf),
    ],
)
def test_limits_that_nothing_meets_are_refused(limit: str, value: float) -> None:
    with pytest.raises(UserError, match="--" + limit.replace("_", "-")):
        replace(Limits(), **{limit: value})


def test_scores_do_not_change_with_the_company_a_run_keeps(store: Store, candidate: Store, add_pair: Add) -> None:
    add_pair("flap", 0.2, lose={"piqa": 3})
    alone = regress(store, candidate, Limits()).runs[0].evidence
    add_pair("random", 0.2)
    together = regress(store, candidate, Limits()).runs[0].evidence
    assert alone is not None
    assert together is not None
    assert together.average.interval == alone.average.interval
    assert together.average.p_worse == alone.average.p_worse
    assert alone.average.p_worse_holm == pytest.approx(FAMILIES * alone.average.p_worse)
    assert together.average.p_worse_holm == pytest.approx(2 * FAMILIES * alone.average.p_worse)
