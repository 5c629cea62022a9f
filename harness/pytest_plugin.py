"""A pytest fixture that fails a test where a candidate's accuracy is worse than a reference's for real.

pytest finds it in every environment that this package is installed in; nothing is imported before a test asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from harness.regression import Regression


class NoRegression(Protocol):
    """What the fixture is."""

    def __call__(
        self,
        reference: Path | str,
        candidate: Path | str,
        *,
        tolerance: float = 1.0,
        min_recovery: float | None = None,
        max_loss_increase: float | None = None,
        max_params_ratio: float | None = None,
        max_time_ratio: float | None = None,
        allow_different: bool = False,
        require_all: bool = False,
        allow_cannot_tell: bool = False,
    ) -> Regression:
        """Compare two results folders, as `harness regress` does with flags of these names."""


@pytest.fixture
def no_regression() -> NoRegression:
    """Call it with a reference and a candidate results folder; the test fails where the check does not pass.

    With ``allow_cannot_tell`` too few documents to tell are no failure. It returns the comparison for further asserts.
    """

    def check(
        reference: Path | str,
        candidate: Path | str,
        *,
        allow_different: bool = False,
        require_all: bool = False,
        allow_cannot_tell: bool = False,
        **limits: float | None,
    ) -> Regression:
        from harness.regression import Limits, regress, to_markdown
        from harness.results import results_at

        given = {name: limit for name, limit in limits.items() if limit is not None}
        ours, theirs = results_at(str(reference)), results_at(str(candidate))
        for results in (ours, theirs):
            results.pull()
        found = regress(
            ours.store, theirs.store, Limits(**given), allow_different=allow_different, require_all=require_all
        )
        if found.verdict == "fail" or (found.verdict == "cannot tell" and not allow_cannot_tell):
            pytest.fail(to_markdown(found), pytrace=False)
        return found

    return check
