"""The figures measured on published implementations, read as `harness verify` reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from harness.fidelity.golden import CHECKOUT_FOLDER, Golden
from harness.fidelity.replay import heldout_loss as golden_loss
from harness.fidelity.replay import reimplemented, settings_of
from harness.method import ReimplementedMethod
from harness.models import LoadedModel
from harness.published import PublishedCase

GOLDEN = Golden(CHECKOUT_FOLDER)


@pytest.fixture(scope="session")
def golden_tokens() -> Callable[[int, int], Tensor]:
    """First rows and columns of the fixed calibration token ids."""
    return lambda rows, columns: GOLDEN.calibration((rows, columns))


@pytest.fixture(scope="session")
def heldout_loss() -> Callable[[Any], float]:
    """Mean loss over two batches of eight held-out sequences of 256 tokens."""
    return lambda model: golden_loss(model, GOLDEN)


@pytest.fixture(scope="session")
def published_cases(smollm2: LoadedModel) -> Callable[[str], dict[str, PublishedCase]]:
    """The published cases of a method, by name."""
    return lambda method: {case.name: case for case in GOLDEN.cases(method, smollm2.structure)}


@pytest.fixture(scope="session")
def fidelity_mode(published_cases: Any) -> Callable[..., ReimplementedMethod]:
    """The method as a case had it: ``fidelity_mode("flap", "alam_wifv_0.2")``, with changes where asked for."""

    def build(method: str, case: str, **changes: Any) -> ReimplementedMethod:
        return reimplemented(method, {**settings_of(published_cases(method)[case]), **changes})

    return build
