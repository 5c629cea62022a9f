"""Models in the formats of other programs: GGUF, which llama.cpp runs."""

from harness.export.gguf_file import PRECISIONS, Exported, export_gguf

__all__ = ["FORMATS", "PRECISIONS", "Exported", "export_gguf"]

FORMATS = ("gguf",)
"""What `harness export --format` takes."""
