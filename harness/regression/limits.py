"""How much worse a candidate may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from harness.errors import UserError

DEFAULT_TOLERANCE = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What is allowed; what is None is shown, not checked.

    Raises:
        UserError: a limit that nothing can meet.
    """

    tolerance: float = DEFAULT_TOLERANCE
    """Points (percent right) that the average may drop."""
    min_recovery: float | None = None
    """Least share of the candidate's own dense average that a pruned candidate must keep."""
    max_loss_increase: float | None = None
    """Nats per token that the held-out loss may grow (0.02 is 2% of perplexity)."""
    max_params_ratio: float | None = None
    """Counted parameters of the candidate over the reference's."""
    max_time_ratio: float | None = None
    """Seconds that pruning takes, over the reference's."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"{_flag(field.name)} {value} is not a number to compare with")
        if not 0 < self.tolerance / 100 <= 1:
            raise UserError(
                f"--tolerance {self.tolerance:g} is not in (0, 100] points: that nothing dropped at all can be shown "
                "with no number of documents, so pass the drop that may be, such as 1.0"
            )
        if self.min_recovery is not None and not 0 < self.min_recovery <= 1:
            raise UserError(f"--min-recovery {self.min_recovery:g} is not in (0, 1]; pass a share, such as 0.95")
        if self.max_loss_increase is not None and self.max_loss_increase < 0:
            raise UserError(f"--max-loss-increase {self.max_loss_increase:g} is negative; pass nats, such as 0.02")
        for name in ("max_params_ratio", "max_time_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and ratio <= 0:
                raise UserError(f"{_flag(name)} {ratio:g} is not positive; 1 is as much as the reference")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
