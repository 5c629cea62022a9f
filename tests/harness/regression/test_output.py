"""What people, CI servers and GitHub read."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest

from harness.records import RunRecord
from harness.regression import Limits, Regression, regress, to_annotations, to_junit, to_markdown
from harness.store import Store

Add = Callable[..., tuple[RunRecord, RunRecord]]


@pytest.fixture
def found(store: Store, candidate: Store, add_pair: Add) -> Regression:
    """Four runs: one fails, one cannot tell, two pass, of which one was made with another torch."""
    before, _ = add_pair("random", 0.2)
    add_pair("flap", 0.2, lose={"hellaswag": 15, "piqa": 15})
    assert before.provenance is not None
    add_pair("slicegpt", 0.2, lose={"piqa": 3, "arc_easy": 3})
    add_pair(
        "magnitude", 0.2,
        provenance=before.provenance.model_copy(update={"packages": {"torch": "2.14.0", "lm-eval": "0.4.13"}}),
    )  # fmt: skip
    return regress(store, candidate, Limits(2.0), allow_different=True)


def test_markdown_has_a_line_per_run_and_says_what_did_not_pass(found: Regression) -> None:
    page = to_markdown(found)
    assert page.startswith("# Regression: ❌ fail")
    assert "4 runs compared with the reference (2 pass, 1 fail, 1 cannot tell)" in page
    rows = [line for line in page.splitlines() if line.startswith("| smollm2-135m")]
    assert [("✅" in row, "❌" in row, "❔" in row) for row in rows] == [
        (False, True, False), (True, False, False), (True, False, False), (False, False, True),
    ]  # fmt: skip
    assert "> [!WARNING]\n> Compared although more than the code differs: version of torch: 2.13.0" in page
    assert "hellaswag: fail; " in page
    assert "with " in page
    assert "documents it would be in 80% of comparisons" in page


def test_junit_counts_failures_and_errors_of_every_check(found: Regression) -> None:
    root = ET.fromstring(to_junit(found))
    suite = root.find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    assert int(suite.get("tests", "0")) == len(cases) == sum(len(run.checks) for run in found.runs)
    failures = [case for case in cases if case.find("failure") is not None]
    errors = [case for case in cases if case.find("error") is not None]
    assert (int(suite.get("failures", "0")), int(suite.get("errors", "0"))) == (len(failures), len(errors))
    assert {case.get("name") for case in failures} >= {"hellaswag", "piqa"}
    assert len(errors) == 1
    assert all(case.get("classname", "").startswith("smollm2-135m--") for case in cases)


def test_junit_is_xml_whatever_a_reason_holds(store: Store, candidate: Store, add_pair: Add) -> None:
    add_pair(status="failed", reason="\x1b[31mout of memory\x00 <&>")
    (case,) = ET.fromstring(to_junit(regress(store, candidate, Limits()))).iter("testcase")
    assert "\N{REPLACEMENT CHARACTER}[31mout of memory" in next(iter(case)).get("message", "")


def test_annotations_are_workflow_commands_on_one_line_each(found: Regression) -> None:
    lines = to_annotations(found)
    assert lines[0].startswith("::error title=harness regress::fail: 4 runs")
    assert any(line.startswith("::warning title=harness regress::Compared although") for line in lines)
    assert any(line.startswith("::error title=smollm2-135m--flap--") and "%2C hellaswag::" in line for line in lines)
    assert not any("\n" in line for line in lines)
    # A bare percent sign would start an escape.
    assert not any("%" in line.replace("%25", "").replace("%2C", "").replace("%3A", "") for line in lines)
