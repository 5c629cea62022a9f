"""Commands that look something up and run nothing."""

from __future__ import annotations

import sys
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.table import Table

from harness.options import BatchTokens, CalibrationLength, CalibrationSamples, Device, DtypeName, Stream
from harness.terminal import console


def methods(name: Annotated[str | None, typer.Argument(help="Show this method's settings.")] = None) -> None:
    """List the methods, or one method's settings with their defaults."""
    from harness.registry import known_methods, method_class

    if name is None:
        table = Table("method", "paper", "what it does")
        for known in known_methods():
            cls = method_class(known)
            table.add_row(known, cls.paper, next(iter((cls.__doc__ or "").strip().splitlines()), ""))
        console.print(table)
        return
    cls = method_class(name)
    published = getattr(cls, "published", {})
    table = Table("setting", "type", "default", "as published", "meaning")
    for field, info in cls.model_fields.items():
        kind = _kind_of(info.annotation)
        departs = str(published[field]) if field in published else ""
        table.add_row(f"{name}.{field}", kind, str(info.default), departs, info.description or "")
    console.print(table)


def _kind_of(annotation: Any) -> str:
    """``int | None`` of ``Optional[Annotated[int, ...]]``."""
    if get_origin(annotation) is Annotated:
        return _kind_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_kind_of, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def models() -> None:
    """List the known models; any hub id or folder of a Llama-family checkpoint works too."""
    from harness.models.catalog import CATALOG

    table = Table("model", "hub id", "parameters", "embeddings", "note")
    for name, entry in CATALOG.items():
        tied = "tied" if entry.tied else "untied"
        table.add_row(name, entry.hub_id or "(installed package)", f"{entry.num_params:,}", tied, entry.note)
    console.print(table)


def doctor(
    model: Annotated[str, typer.Option(help="Catalog name, hub id or folder.")] = "smollm2-135m",
    methods: Annotated[str, typer.Option(help="Comma-separated methods, or `all`.")] = "all",
    dtype: DtypeName = "float32",
    device: Device = "cpu",
    calibration_samples: CalibrationSamples = 64,
    calibration_length: CalibrationLength = 128,
    batch_tokens: BatchTokens = 4096,
    stream: Stream = False,
) -> None:
    """Say what comparing methods on a model needs, and whether this machine can; nothing is downloaded."""
    from harness.doctor import diagnose, gigabytes, methods_to_check
    from harness.models.loading import require_device
    from harness.request import calibration_spec, chosen_dtype, model_ref

    require_device(device)
    found = diagnose(
        model_ref(model),
        methods_to_check(methods),
        chosen_dtype(dtype, device),
        device,
        calibration_spec("wikipedia", calibration_samples, calibration_length),
        batch_tokens,
        stream=stream,
    )
    seen = found.prospect
    gate = ", gated: accept its licence on the hub and `hf auth login` first" if seen.gated else ""
    console.print(
        f"model     {seen.source}, {found.num_params:,} parameters, {gigabytes(found.weight_bytes)} in {found.dtype}\n"
        f"download  {'about ' + gigabytes(seen.download_bytes) if seen.download_bytes else 'none'}{gate}\n"
        f"disk      {gigabytes(found.disk_bytes)} needed, {gigabytes(found.free_disk_bytes)} free at {seen.cache}\n"
        f"device    {found.device} ({found.device_name}), {gigabytes(found.memory_bytes)} of memory free",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("method", "peak while pruning", "peak while scoring", "fits")
    for need in found.methods:
        told = need.unsupported or ("yes" if found.fits(need) else "no")
        table.add_row(need.method, gigabytes(need.pruning_bytes), gigabytes(need.scoring_bytes), told)
    console.print(table)
    if found.verdict is not None:
        console.print(f"This machine cannot: {found.verdict}.", highlight=False, soft_wrap=True)
        sys.exit(1)
    console.print("This machine can.", highlight=False)


def tasks() -> None:
    """List the tasks and task groups."""
    from harness.evaluation.tasks import known_tasks

    for name in known_tasks():
        console.print(name)


def texts() -> None:
    """List the texts that `--calibration` takes by name; a .txt or .jsonl file is the other way to give one."""
    from harness.corpora import known_corpora

    for name in known_corpora():
        console.print(name)
