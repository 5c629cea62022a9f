"""Models: where they come from, how they are rebuilt at other widths, how they are saved."""

from harness.models.assemble import assemble, remove_units
from harness.models.loading import LoadedModel, load_model

__all__ = ["LoadedModel", "assemble", "load_model", "remove_units"]
