"""What a comparison of a model needs, said before anything is downloaded: download, disk, memory per method, device."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from harness.footprint import PROCESS_BYTES, Footprint
from harness.method import InterleavedMethod
from harness.models.prospect import Prospect, prospect
from harness.records import CalibrationSpec, Dtype, ModelRef
from harness.registry import build_method, known_methods
from harness.structure import count_parameters, describe
from harness.track import Track

RESULTS_BYTES = 200 * 2**20
"""Records and per-document scores of a full comparison, generously."""


@dataclass(frozen=True)
class MethodNeed:
    """What one method needs on this model."""

    method: str
    pruning_bytes: int
    scoring_bytes: int
    unsupported: str | None
    """Why the method cannot prune the model, or not while it is streamed; None where it can."""

    @property
    def peak_bytes(self) -> int:
        """The larger of the two."""
        return max(self.pruning_bytes, self.scoring_bytes)


@dataclass(frozen=True)
class Diagnosis:
    """What is needed and what is there."""

    prospect: Prospect
    num_params: int
    dtype: Dtype
    weight_bytes: int
    """In memory, at ``dtype``."""
    device: str
    device_name: str
    memory_bytes: int
    """Free on the device."""
    disk_bytes: int
    """To be written: what is downloaded, and results."""
    free_disk_bytes: int
    """Where downloads go."""
    methods: tuple[MethodNeed, ...]
    streamed: bool = False

    def fits(self, need: MethodNeed) -> bool:
        """Whether a method that supports the model has the memory it needs."""
        return need.peak_bytes <= self.memory_bytes

    @property
    def verdict(self) -> str | None:
        """Why this machine cannot make the comparison, in a sentence; None where it can."""
        if self.disk_bytes > self.free_disk_bytes:
            return f"it needs {gigabytes(self.disk_bytes)} of disk and {gigabytes(self.free_disk_bytes)} are free"
        too_large = [n for n in self.methods if n.unsupported is None and not self.fits(n)]
        if not too_large:
            return None
        names = ", ".join(need.method for need in too_large)
        most = gigabytes(max(need.peak_bytes for need in too_large))
        return (
            f"{names} would need up to {most} of memory and {gigabytes(self.memory_bytes)} are free on {self.device}"
            + ("; --dtype bfloat16 needs half" if self.dtype == "float32" else "")
            + ("; --stream leaves layers in their files and needs a fraction" if not self.streamed else "")
        )


def gigabytes(count: int) -> str:
    """A size as a reader wants it, in units of 2^30 bytes."""
    return f"{count / 2**30:.1f} GiB"


def diagnose(
    ref: ModelRef,
    methods: Sequence[str],
    dtype: Dtype,
    device: str,
    calibration: CalibrationSpec,
    batch_tokens: int = 4096,
    *,
    stream: bool = False,
) -> Diagnosis:
    """Compare what a comparison of ``methods`` on one model needs with what this machine has.

    Args:
        ref: which model; of its files only ``config.json`` is read, and of a catalog model nothing.
        methods: names in the registry.
        dtype: of the weights in memory.
        device: torch device that is there.
        calibration: how many tokens methods score with.
        batch_tokens: tokens scored at once.
        stream: leave layers in their files until they run.

    Raises:
        UserError: the model is unknown, or its architecture cannot be pruned.
    """
    seen = prospect(ref)
    footprint = _footprint(seen, dtype, calibration, stream=stream)
    name, memory = _device(device)
    return Diagnosis(
        prospect=seen, num_params=footprint.params.total, dtype=dtype, weight_bytes=footprint.weight_bytes,
        device=device, device_name=name, memory_bytes=memory, disk_bytes=seen.download_bytes + RESULTS_BYTES,
        free_disk_bytes=_free_disk(seen.cache),
        methods=tuple(_need(method, footprint, batch_tokens) for method in methods), streamed=stream,
    )  # fmt: skip


def memory_of(track: Track) -> int | None:
    """Bytes of a machine's memory that a track takes; None where its model lies on another device.

    Raises:
        UserError: the model is unknown, or its architecture cannot be pruned.
    """
    spec = track.specs[0]
    if torch.device(track.device).type != "cpu":
        return None
    footprint = _footprint(prospect(spec.model), spec.dtype, spec.calibration or CalibrationSpec(), stream=track.stream)
    need = _need(spec.method, footprint, track.batch_tokens).peak_bytes
    if spec.recovery is None:
        return need
    how = spec.recovery
    training = footprint.training_bytes(how.micro_batch_tokens, checkpointing=how.gradient_checkpointing)
    return max(need, training)


def methods_to_check(names: str) -> list[str]:
    """Comma-separated names, or all."""
    return list(known_methods()) if names == "all" else [name.strip() for name in names.split(",")]


def _footprint(seen: Prospect, dtype: Dtype, calibration: CalibrationSpec, *, stream: bool) -> Footprint:
    return Footprint(
        structure=describe(seen.model),
        params=count_parameters(seen.model.named_parameters()),
        vocab_size=seen.model.config.vocab_size,
        bytes_per_weight=torch.finfo(getattr(torch, dtype)).bits // 8,
        num_samples=calibration.num_samples,
        num_tokens=calibration.num_tokens,
        streamed=stream,
    )


def _need(name: str, footprint: Footprint, batch_tokens: int) -> MethodNeed:
    method = build_method(name)
    held = PROCESS_BYTES + footprint.held_bytes
    reason = method.why_unsupported(footprint.structure)
    if reason is None and footprint.streamed and isinstance(method, InterleavedMethod):
        reason = "trains weights, which --stream leaves in their files"
    working = 0 if reason is not None else method.working_bytes(footprint)
    return MethodNeed(name, held + working, footprint.scoring_bytes(batch_tokens, copy=name != "dense"), reason)


def _device(device: str) -> tuple[str, int]:
    """Name and free bytes of a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
    return f"{os.cpu_count()} CPU cores", psutil.virtual_memory().available


def _free_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
