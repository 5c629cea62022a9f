"""What `harness verify` calls a disagreement, and the page it writes; the runs themselves are the golden tests'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.fidelity.golden import CHECKOUT_FOLDER, Golden
from harness.fidelity.page import departures, fidelity_page
from harness.fidelity.replay import Outcome, multi_head_expansion, reimplemented, settings_of
from harness.fidelity.verify import CaseResult, MethodFidelity, Overlap, VariantResult, variants_of
from harness.models import LoadedModel
from harness.published import PublishedCase, PublishedFigures
from harness.registry import PUBLISHED_READERS, build_method

KEPT = {"layers.0.attention": frozenset({0, 2}), "layers.0.mlp": frozenset(range(400))}
FIGURES = PublishedFigures(params=1000, loss=5.0, kept=KEPT, seconds=10.0, peak_bytes=2**30)
CASE = PublishedCase("a-case", "llm-pruner", {"importance": "l2"}, 0.25, (10, 64), FIGURES)
OURS = Outcome(params=1000, loss=5.001, kept=KEPT, seconds=4.0, peak_bytes=2**29)


def result(**changes: object) -> CaseResult:
    return CaseResult(CASE, {"importance": "l2"}, replace(OURS, **changes))  # type: ignore[arg-type]


def test_the_published_result_has_no_disagreement() -> None:
    assert result().disagreements == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"params": 1001}, "1,001 parameters, published 1,000"),
        ({"loss": 5.003}, "loss 5.0030, published 5.0000"),
        ({"loss": float("nan")}, "loss nan"),
        ({"kept": {**KEPT, "layers.0.mlp": frozenset(range(3, 403))}}, "397 of 400 kept mlp units shared"),
    ],
)
def test_each_bound_that_is_missed_is_named(changes: dict[str, object], named: str) -> None:
    assert any(named in text for text in result(**changes).disagreements)


def test_overlap_counts_the_units_that_both_keep() -> None:
    ours = {"layers.0.mlp": frozenset({1, 2, 3}), "layers.1.mlp": frozenset({0})}
    theirs = {"layers.0.mlp": frozenset({2, 3, 4, 5}), "layers.2.mlp": frozenset({7})}
    assert Overlap.between(ours, theirs, "mlp") == Overlap(2, 4)
    assert Overlap.between(ours, theirs, "attention").share == 1.0


def test_the_page_shows_ours_beside_the_published_figures_and_every_departure() -> None:
    variants = (VariantResult({}, OURS), VariantResult({"query_fold": "upstream"}, replace(OURS, loss=5.5)))
    page = fidelity_page([MethodFidelity("llm-pruner", (result(loss=6.0),), variants)], "a machine")
    row = next(line for line in page.splitlines() if line.startswith("| a-case"))
    for cell in ("2 of 2", "400 of 400", "6.0000", "5.0000", "+1.0e+00", "4.0", "10.0", "512", "1,024"):
        assert f" {cell} " in row, cell
    assert "+0.4990" in next(line for line in page.splitlines() if line.startswith("| `query_fold"))
    assert "a-case: loss 6.0000, published 5.0000" in page
    assert departures("llm-pruner") in page


@pytest.mark.parametrize("method", PUBLISHED_READERS)
def test_every_departure_of_a_method_is_explained_and_measured(method: str) -> None:
    published = reimplemented(method, {}).published
    defaults = build_method(method).model_dump()
    explained = (type(build_method(method)).__doc__ or "") + departures(method)
    for name, value in published.items():
        assert defaults[name] != value, f"{name} is no departure"
        assert any(variant.get(name) == value for variant in variants_of(method)), name
        assert name in explained, name


@pytest.mark.parametrize("method", PUBLISHED_READERS)
def test_every_measured_case_names_settings_the_method_takes(method: str, smollm2: LoadedModel) -> None:
    cases = Golden(CHECKOUT_FOLDER).cases(method, smollm2.structure)
    assert cases
    for case in cases:
        reimplemented(method, settings_of(case))
        if case.figures.kept is not None:
            assert set(case.figures.kept) <= set(smollm2.structure.by_name)


def test_the_multi_head_expansion_is_the_same_function(make_tiny: object) -> None:
    loaded = make_tiny("grouped-query")  # type: ignore[operator]
    tokens = torch.arange(12)[None]
    expanded = multi_head_expansion(loaded)
    assert expanded.structure.query_group_size == 1
    torch.testing.assert_close(expanded.model(tokens).logits, loaded.model(tokens).logits)


def test_a_folder_without_figures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tests/golden folder"):
        Golden(tmp_path)
