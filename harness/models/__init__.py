"""Models: where they come from, how they are rebuilt at other widths, how they are saved."""

from harness.models.assemble import assemble
from harness.models.loading import LoadedModel, load_model
from harness.models.streaming import micro_batch_rows, rebuilt, remove_units, state_of, weight_of

__all__ = [
    "LoadedModel",
    "assemble",
    "load_model",
    "micro_batch_rows",
    "rebuilt",
    "remove_units",
    "state_of",
    "weight_of",
]
