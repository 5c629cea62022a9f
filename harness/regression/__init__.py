"""Is a candidate's accuracy worse than a reference's for real? Pass, fail or cannot tell, from the records of both."""

from harness.regression.judge import Regression, regress
from harness.regression.limits import Limits
from harness.regression.output import headline, to_annotations, to_junit, to_markdown

__all__ = ["Limits", "Regression", "headline", "regress", "to_annotations", "to_junit", "to_markdown"]
