"""Does interleaving pruning with training pay? The experiment of docs/training.md, as `harness compare` commands.

    python benchmarks/recovery.py                        # prints and runs them, into results/recovery
    python benchmarks/recovery.py --tokens 200k --train learning_rate=2e-5 --out elsewhere

At each sparsity, with the same tokens in the same order: Adapt-Pruner, LLM-Pruner and FLAP in one shot and then trained
in full, LLM-Pruner with LoRA, and Adapt-Accel with 2, 4 and 8 rounds; the untrained ones beside them. A run that is
there is not made again, so the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

OUT = Path(__file__).parents[1] / "results" / "recovery"


def commands(options: argparse.Namespace) -> list[list[str]]:
    """The comparisons: which methods, and how they are trained."""
    training = ["--recovery-tokens", options.tokens, "--recovery-text", options.text]
    for setting in options.train:
        training += ["--train", setting]
    asked = [
        ["--methods", "dense,adapt-pruner,llm-pruner,flap"],
        ["--methods", "adapt-pruner,llm-pruner,flap", "--recovery", "full", *training],
        ["--methods", "llm-pruner", "--recovery", "lora", *training],
    ]
    interleaved = ["--methods", "adapt-accel", "--set", f"adapt-accel.samples_per_step={options.samples_per_step}"]
    asked += [
        [*interleaved, "--set", f"adapt-accel.rounds={rounds}", "--recovery", "full", *training]
        for rounds in options.rounds.split(",")
    ]
    common = ["--sparsities", options.sparsities, "--tasks", "commonsense", "--limit", str(options.limit),
              "--no-efficiency", "--out", str(options.out)]  # fmt: skip
    return [[*part, *common] for part in asked]


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", default="48k")
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
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for command in commands(options):
        print("harness compare", shlex.join(command), flush=True)
        subprocess.run([sys.executable, "-m", "harness.cli", "compare", *command], check=True)
    subprocess.run([sys.executable, "-m", "harness.cli", "report", str(options.out), "--html"], check=True)


if __name__ == "__main__":
    main()
