"""Does interleaving pruning with training pay? The experiment of docs/training.md, as `harness compare` commands.

    python benchmarks/recovery.py                        # prints and runs them, into results/recovery
    python benchmarks/recovery.py --tokens 200k --train learning_rate=2e-5 --out elsewhere
    python benchmarks/recovery.py --ablations            # into results/recovery-ablations

At each sparsity, with the same tokens in the same order: Adapt-Pruner, LLM-Pruner and FLAP in one shot and then trained
in full, LLM-Pruner with LoRA, and Adapt-Accel with 2, 4 and 8 rounds; the untrained ones beside them. A run that is
there is not made again, so the command goes on where it was stopped.

The ablations ask, of Adapt-Pruner in one shot and of Adapt-Accel with 4 rounds at 40%, what changes the answer: the
seed, AdamW's moments carried across a pruning step or not, the learning rate, the number of tokens.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def commands(options: argparse.Namespace) -> list[list[str]]:
    """The comparisons: which methods, and how they are trained."""
    training = _training_flags(options.tokens, options.text, options.train)
    asked = [
        ["--methods", "dense,adapt-pruner,llm-pruner,flap"],
        ["--methods", "adapt-pruner,llm-pruner,flap", "--recovery", "full", *training],
        ["--methods", "llm-pruner", "--recovery", "lora", *training],
    ]
    interleaved = (_adapt_accel(rounds, options) for rounds in options.rounds.split(","))
    asked += [[*part, "--recovery", "full", *training] for part in interleaved]
    return [[*part, "--sparsities", options.sparsities, *_common_flags(options)] for part in asked]


def ablations(options: argparse.Namespace) -> list[list[str]]:
    """The comparisons that change one thing each."""
    one_shot, interleaved = ["--methods", "adapt-pruner"], _adapt_accel("4", options)
    training = _training_flags(options.tokens, options.text, options.train)
    slower = [*training, "--train", "learning_rate=2e-5"]
    longer = _training_flags("120k", options.text, options.train)
    asked = [
        [*one_shot, *training, "--seeds", "0,1,2"],
        [*interleaved, *training, "--seeds", "0,1,2"],
        [*interleaved, "--set", "adapt-accel.carry_moments=false", *training],
        [*one_shot, *slower],
        [*interleaved, *slower],
        [*one_shot, *longer],
        [*interleaved, *longer],
    ]
    return [[*part, "--recovery", "full", "--sparsities", "0.4", *_common_flags(options)] for part in asked]


def _training_flags(tokens: str, text: str, settings: list[str]) -> list[str]:
    flags = ["--recovery-tokens", tokens, "--recovery-text", text]
    return [*flags, *(part for setting in settings for part in ("--train", setting))]


def _adapt_accel(rounds: str, options: argparse.Namespace) -> list[str]:
    settings = {"samples_per_step": options.samples_per_step, "rounds": rounds}
    changes = (part for name, value in settings.items() for part in ("--set", f"adapt-accel.{name}={value}"))
    return ["--methods", "adapt-accel", *changes]


def _common_flags(options: argparse.Namespace) -> list[str]:
    return ["--tasks", "commonsense", "--limit", str(options.limit), "--no-efficiency", "--out", str(options.out)]


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", default="40k")
    parser.add_argument("--text", default="reading")
    parser.add_argument("--sparsities", default="0.2,0.4")
    parser.add_argument("--rounds", default="2,4,8")
    parser.add_argument(
        "--samples-per-step", type=int, default=8, help="calibration sequences that Adapt-Accel looks at"
    )
    parser.add_argument("--limit", type=int, default=60, help="documents of each commonsense task")
    parser.add_argument(
        "--train", action="append", default=["batch_tokens=2048", "learning_rate=1e-4", "heldout_points=6"]
    )
    parser.add_argument(
        "--ablations", action="store_true", help="these instead, with sparsities, rounds and seeds of their own"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or RESULTS / ("recovery-ablations" if options.ablations else "recovery")
    for command in (ablations if options.ablations else commands)(options):
        print("harness compare", shlex.join(command), flush=True)
        subprocess.run([sys.executable, "-m", "harness.cli", "compare", *command], check=True)
    subprocess.run([sys.executable, "-m", "harness.cli", "report", str(options.out), "--html"], check=True)


if __name__ == "__main__":
    main()
