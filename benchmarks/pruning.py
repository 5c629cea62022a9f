"""Times each method's pruning step against its published implementation and against the floor.

    python benchmarks/pruning.py                                # ten minutes on 2 cores
    python benchmarks/pruning.py --cases case3 --profile        # one case, and where its time goes
    python benchmarks/pruning.py --pass-dtype bfloat16          # the passes in bfloat16

Settings, tokens and published figures are those of the fidelity cases (`harness verify`), so what is timed is known to
give the published result. Every repeat is a process of its own. Floor: the passes that the algorithm cannot do without,
at the speed of transformers' own batched forward (and autograd's backward) in the same process, right after ours; for
SliceGPT also the eigendecompositions and second moments. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harness.efficiency import measured
from harness.fidelity.golden import CHECKOUT_FOLDER, Golden
from harness.fidelity.replay import in_fresh_process, load_dense, reimplemented, settings_of
from harness.method import PrunedModel
from harness.models import LoadedModel
from harness.published import PublishedCase
from harness.registry import PUBLISHED_READERS
from harness.structure import count_parameters

MAIN_CASES = {
    "adapt-pruner": "c1_adapt_a002_t80",
    "llm-pruner": "case3_taylor_first_4_25_r25",
    "flap": "alam_wifv_0.2",
    "slicegpt": "s20",
}
"""The case that stands for its method in the JSON line."""
FURTHER_CASES = ("c5_adapt_a002_t80_l2", "case4a_taylor_second_4_25_r25")
MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """One case, once."""

    seconds: float
    floor_seconds: float
    peak_bytes: int


def plain_forward(loaded: LoadedModel, tokens: Tensor) -> None:
    """transformers' own blocks, batch by batch, no head."""
    with torch.no_grad():
        for rows in tokens.split(8):  # type: ignore[no-untyped-call]
            loaded.model.model(input_ids=rows, use_cache=False)


def plain_backward(loaded: LoadedModel, tokens: Tensor, layers: range) -> None:
    """transformers' own loss, and autograd's gradients of the weights of some layers."""
    for i, layer in enumerate(loaded.model.model.layers):
        layer.requires_grad_(i in layers)
    loaded.model(input_ids=tokens, labels=tokens).loss.backward()
    for parameter in loaded.model.parameters():
        parameter.grad = None
    loaded.model.requires_grad_(False)


def seconds_of(work: Callable[[], None]) -> float:
    """The faster of two runs."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def plain_decompositions(hidden_size: int, num_tokens: int, count: int) -> float:
    """Seconds of ``count`` symmetric eigendecompositions and second moments in float64, from a few of them."""
    signal = torch.randn(num_tokens, hidden_size)

    def work() -> None:
        for _ in range(3):
            rows = signal.double()
            torch.linalg.eigh(rows.T @ rows)

    return seconds_of(work) / 3 * count


def floor_seconds(case: PublishedCase, loaded: LoadedModel, tokens: Tensor, pruned: PrunedModel) -> float:
    """What the passes of a case take at the least."""
    depth = loaded.structure.num_layers
    if case.method == "flap":
        return seconds_of(lambda: plain_forward(loaded, tokens))
    if case.method == "slicegpt":
        passes = seconds_of(lambda: plain_forward(loaded, tokens))
        return passes + plain_decompositions(loaded.structure.hidden_size, tokens.numel(), 1 + 2 * depth)
    if case.method == "llm-pruner":
        first, last = case.params["first_layer"], case.params["last_layer"]
        assert isinstance(first, int)
        assert isinstance(last, int)
        return seconds_of(lambda: plain_backward(loaded, tokens, range(first, last + 1)))
    one = seconds_of(
        lambda: (
            plain_backward(loaded, tokens, range(depth))
            if case.params["importance"] == "param_first"
            else plain_forward(loaded, tokens)
        )
    )
    # A step runs on the model as it is by then: the passes shrink with its parameters.
    steps: Any = pruned.trace["steps"]
    dense = loaded.params.total
    return one * sum(size / dense for size in [dense, *(step["params"] for step in steps[:-1])])


def run(case: PublishedCase, golden: Golden, pass_dtype: str | None, show_profile: bool) -> Timing:
    """Load, prune, and measure the floor in the same process."""
    loaded = load_dense(case.multi_head)
    tokens = golden.calibration(case.calibration)
    extra = {} if pass_dtype is None else {"pass_dtype": pass_dtype}
    method = reimplemented(case.method, {**settings_of(case), **extra})
    with measured() as cost:
        pruned = method.prune_at(loaded, tokens, case.knob, seed=0)
    if pass_dtype is None:
        assert count_parameters(pruned.model.named_parameters()).total == case.figures.params, case.name
    floor = floor_seconds(case, loaded, tokens, pruned)
    if show_profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            method.prune_at(loaded, tokens, case.knob, seed=0)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))
    return Timing(cost.seconds, floor, cost.peak_bytes)


def median(timings: list[Timing]) -> Timing:
    """Figure by figure."""
    columns = {name: [asdict(t)[name] for t in timings] for name in asdict(timings[0])}
    return replace(timings[0], **{name: type(values[0])(statistics.median(values)) for name, values in columns.items()})


def figures(case: PublishedCase, found: Timing) -> dict[str, float]:
    """What the JSON line says of a case."""
    told = {
        "seconds": round(found.seconds, 2),
        "peak_mib": round(found.peak_bytes / MIB),
        "floor_seconds": round(found.floor_seconds, 2),
        "over_floor": round(found.seconds / found.floor_seconds, 2),
    }
    if case.figures.seconds is not None and case.figures.peak_bytes is not None:
        told |= {
            "published_seconds": round(case.figures.seconds, 2),
            "published_peak_mib": round(case.figures.peak_bytes / MIB),
            "times_faster": round(case.figures.seconds / found.seconds, 2),
        }
    return told


def main() -> None:
    """Run the cases and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", help="parts of case names; default the main ones and two more")
    parser.add_argument("--repeats", type=int, default=1, help="processes per case; the median counts")
    parser.add_argument("--pass-dtype", choices=["weights", "bfloat16"], help="type the passes compute in")
    parser.add_argument("--profile", action="store_true", help="also print where each case's time goes")
    arguments = parser.parse_args()

    golden = Golden(CHECKOUT_FOLDER)
    structure = load_dense().structure
    every = [case for method in PUBLISHED_READERS for case in golden.cases(method, structure)]
    if arguments.cases:
        chosen = [case for case in every if any(part in case.name for part in arguments.cases)]
    else:
        chosen = [case for case in every if case.name in (*MAIN_CASES.values(), *FURTHER_CASES)]
    told: dict[str, dict[str, float]] = {}
    for case in chosen:
        job = (run, case, golden, arguments.pass_dtype, arguments.profile)
        found = median([in_fresh_process(*job) for _ in range(arguments.repeats)])
        name = case.method if case.name == MAIN_CASES[case.method] else case.name
        told[name] = figures(case, found)
        print(name, told[name], flush=True)
    print(tabulate([{"case": name, **row} for name, row in told.items()], headers="keys", tablefmt="pipe"))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
