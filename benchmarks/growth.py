"""Times store scan, `harness report` and `harness regress` on a simulated grid of thousands of runs.

    python benchmarks/growth.py                      # 10,000 runs, records only, as asked for
    python benchmarks/growth.py --runs 1000 --documents

The records are those of ``results/reference`` under other model names, sparsities and seeds; with ``--documents`` their
per-document scores lie beside them. Each command is a process of its own, from the command line to the tables; peak is
its largest resident set. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness.records import ModelRef, RunRecord
from harness.run_files import encode
from harness.store import Store

REFERENCE = Path(__file__).parents[1] / "results" / "reference"
SEEDS = 5
SPARSITIES = tuple(round(0.05 * i, 2) for i in range(1, 11))

SCAN = "import sys, harness.store as s; print(sum(1 for _ in s.Store(sys.argv[1]).records()))"


def grid(num_runs: int) -> Iterator[tuple[RunRecord, str]]:
    """Records, and for each the run of the reference that it was made from."""
    kinds = [record for record in Store(REFERENCE).records() if record.spec.sparsity in (0, 0.2)]
    made, model = 0, 0
    while True:
        for record in kinds:
            dense = record.spec.sparsity == 0
            for sparsity in (0.0,) if dense else SPARSITIES:
                for seed in range(1 if dense else SEEDS):
                    if made == num_runs:
                        return
                    name = ModelRef(name=f"model-{model:03}")
                    spec = record.spec.model_copy(update={"model": name, "sparsity": sparsity, "seed": seed})
                    yield record.model_copy(update={"spec": spec}), record.spec.run_id
                    made += 1
        model += 1


def fill(root: Path, num_runs: int, *, documents: bool) -> None:
    """A results folder of so many runs; nothing waits for the disk, as the store would."""
    store, scores = Store(REFERENCE), {}
    for record, origin in grid(num_runs):
        if documents and origin not in scores:
            scores[origin] = store.documents(origin)
        folder = root / "runs" / record.spec.run_id
        folder.mkdir(parents=True)
        for name, data in encode(record, scores.get(origin)).items():
            (folder / name).write_bytes(data)


def timed(command: list[str]) -> dict[str, float]:
    """Seconds, peak resident bytes and exit code of a process."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 1, 3):
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with status {code}:\n{output.read().decode()[-2000:]}")
    return {"seconds": round(seconds, 2), "peak_bytes": usage.ru_maxrss * 1024, "exit_code": code}


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--documents", action="store_true", help="with per-document scores")
    options = parser.parse_args()
    harness = [sys.executable, "-m", "harness.cli"]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "results"
        fill(root, options.runs, documents=options.documents)
        commands = {
            "import": [sys.executable, "-c", "import harness.cli, pandas"],
            "scan": [sys.executable, "-c", SCAN, str(root)],
            "report": [*harness, "report", str(root)],
            "regress": [*harness, "regress", "--reference", str(root), "--candidate", str(root)],
        }
        found = {}
        for name, command in commands.items():
            found[name] = timed(command)
            print(f"{name:8} {found[name]['seconds']:7.2f} s {found[name]['peak_bytes'] / 2**20:8,.0f} MiB", flush=True)
    print(json.dumps({"runs": options.runs, "documents": options.documents, **found}))


if __name__ == "__main__":
    main()
