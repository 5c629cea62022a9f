"""Times the scorer against stock lm-eval and against the floor: same process, requests, model and threads.

    python benchmarks/scoring.py                                   # 100 documents a task, 50 minutes on 2 cores
    python benchmarks/scoring.py --documents 20 --mmlu-subjects 2 --turns 1  # a first impression

The sides take turns; seconds are medians over the turns, and so are the ratios, each of one turn (their range is
printed). Stock runs at every batch size in the first turn and at the fastest of them from then on.

Floor: the distinct tokens through the blocks at the speed of a plain batched forward pass, plus the output head at the
scored positions; products by the library that ours uses (`harness/cpu.py`), which stock does not. Memory is the growth
of the resident set while a side runs, sampled. In bfloat16 a second table says how far each way of computing is from
stock lm-eval in float32: stock bfloat16 (logits too), ours with the float32 head, and ours with the residual stream,
norms and attention in float32 as well. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from lm_eval.models.huggingface import HFLM
from precision import Scores, apart, flips, float32_products, print_table

from harness.cpu import fast_cpu, matmul_library
from harness.evaluation.forest import grow
from harness.evaluation.precision import float32_stream
from harness.evaluation.quiet import quiet, templates_compiled_once
from harness.evaluation.scorer import Request, TrieScorer
from harness.evaluation.tasks import COMMONSENSE, build_tasks
from harness.models import LoadedModel, load_model
from harness.models.loading import fast_dtype
from harness.records import EvaluationSpec, ModelRef
from harness.timing import fastest

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {
    "wall": time.perf_counter,
    "cpu": lambda: time.process_time() / torch.get_num_threads(),
}
SIDES = ("stock", "ours", "floor")


@dataclass
class Case:
    """Requests of one document set; ``sizes[i]`` choices belong to document i."""

    name: str
    requests: list[Request]
    sizes: list[int]


@dataclass
class Run:
    """What running one side once took and gave."""

    seconds: float = 0.0
    grown_bytes: int = 0
    scores: Scores = field(default_factory=list)


@dataclass
class Timing:
    """Seconds of every turn, by side."""

    seconds: dict[str, list[float]]

    @classmethod
    def total(cls, timings: list[Timing]) -> Timing:
        """Turn by turn, the sum over cases."""
        return cls(
            {side: [sum(turn) for turn in zip(*(t.seconds[side] for t in timings), strict=True)] for side in SIDES}
        )

    def ratios(self, above: str, below: str) -> list[float]:
        """Of every turn."""
        return [a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)]

    def line(self) -> str:
        """Median seconds of the sides, stock / ours and ours / floor with their ranges."""
        seconds = "".join(f"{median(self.seconds[side]):9.1f}" for side in SIDES)
        return seconds + "".join(
            f" {median(ratios):6.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            for ratios in (self.ratios("stock", "ours"), self.ratios("ours", "floor"))
        )


@contextmanager
def measured(clock: Clock) -> Iterator[Run]:
    """Time, and by how much the resident set grew at most (sampled every 20 ms)."""
    run, process, done = Run(), psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        while not done.wait(0.02):
            run.grown_bytes = max(run.grown_bytes, process.memory_info().rss - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = clock()
    yield run
    run.seconds = clock() - start
    done.set()
    sampler.join()


def cases(lm: TrieScorer, spec: EvaluationSpec, subjects: int | None = None) -> Iterator[Case]:
    """The requests lm-eval builds, tokenised: a case per task, or one case of some subjects of MMLU."""
    task_set = build_tasks(spec)
    leaves = list(task_set.leaves)
    if subjects is not None:
        leaves = leaves[:: max(1, len(leaves) // subjects)][:subjects]
    built = []
    with templates_compiled_once():
        for leaf in leaves:
            task = task_set.leaves[leaf]
            task.build_all_requests(samples=task_set.samples.get(leaf))
            sizes = np.unique([i.doc_id for i in task.instances], return_counts=True)[1].tolist()
            built.append(Case(leaf, lm._encode([i.args for i in task.instances]), sizes))
    if subjects is None:
        yield from built
    else:
        requests = [r for case in built for r in case.requests]
        yield Case(f"mmlu, {spec.mmlu_limit} a subject", requests, [n for case in built for n in case.sizes])


class Bench:
    """One model in one dtype, and the ways to run requests through it."""

    def __init__(self, loaded: LoadedModel, options: argparse.Namespace) -> None:
        self.model: Any = loaded.model.eval()
        self.tokenizer: Any = loaded.tokenizer
        self.options = options
        self.clock = CLOCKS[options.clock]

    def stock(self, case: Case, batch_sizes: list[int]) -> tuple[Run, int]:
        """HFLM at the fastest of some batch sizes, and that size."""
        runs = []
        for batch_size in batch_sizes:
            lm = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=batch_size)
            with measured(self.clock) as run:
                run.scores = lm._loglikelihood_tokens(case.requests, disable_tqdm=True)
            runs.append((run, batch_size))
        return min(runs, key=lambda run: run[0].seconds)

    def ours(self, case: Case, *, stream: bool = False) -> Run:
        """Our scorer, with the residual stream of a bfloat16 model in float32 or not."""
        with float32_stream(self.model) if stream else nullcontext():
            lm = TrieScorer(self.model, self.tokenizer, batch_tokens=self.options.batch_tokens)
            assert lm.why_not_fast is None, lm.why_not_fast
            with measured(self.clock) as run:
                run.scores = lm._loglikelihood_tokens(case.requests)
        return run

    def floor(self, case: Case) -> tuple[float, int]:
        """Seconds of the floor, and the distinct tokens."""
        inputs = [np.array(context + continuation[:-1]) for _, context, continuation in case.requests]
        forest = grow(inputs, [len(continuation) for *_, continuation in case.requests])
        scored = len(np.unique(np.concatenate(forest.nodes_of)))
        typical = int(np.median([len(i) for i in inputs]))
        rows = max(1, min(self.options.batch_tokens, forest.num_nodes) // typical)
        head = self.model.get_output_embeddings()
        tokens = torch.randint(0, head.out_features, (rows, typical))
        hidden = torch.randn(min(1024, scored), head.in_features, dtype=head.weight.dtype)
        with torch.no_grad(), fast_cpu():
            of_batch = fastest(lambda: self.model.base_model(tokens, use_cache=False), clock=self.clock)
            per_row = fastest(lambda: head(hidden), clock=self.clock) / len(hidden)
        return of_batch / tokens.numel() * forest.num_nodes + per_row * scored, forest.num_nodes

    def compare(self, case: Case) -> tuple[Timing, dict[str, Run]]:
        """The sides in turns; prints a line. Also the last run of stock and of ours."""
        timing, batch_sizes = Timing({side: [] for side in SIDES}), self.options.stock_batch_sizes
        runs: dict[str, Run] = {}
        for _ in range(self.options.turns):
            runs["stock"], best = self.stock(case, batch_sizes)
            batch_sizes = [best]
            runs["ours"] = self.ours(case)
            floor, tokens = self.floor(case)
            for side, seconds in (*((side, run.seconds) for side, run in runs.items()), ("floor", floor)):
                timing.seconds[side].append(seconds)
        stock, ours = runs["stock"].scores, runs["ours"].scores
        difference = max(abs(a - b) for (a, _), (b, _) in zip(stock, ours, strict=True))
        print(
            f"{case.name:22} {len(case.sizes):5} {tokens:7,}{timing.line()} {difference:9.1e} "
            f"{flips(stock, ours, case.sizes):5} {best:5} "
            + " ".join(f"{run.grown_bytes / 2**20:8,.0f}" for run in runs.values()),
            flush=True,
        )
        return timing, runs


def run(dtype: str, options: argparse.Namespace, exact: dict[str, Scores]) -> dict[str, float]:
    """All cases in one dtype, and the ratios. ``exact`` holds stock's float32 scores by case."""
    loaded = load_model(ModelRef(name=options.model), dtype)
    bench = Bench(loaded, options)
    lm = TrieScorer(loaded.model, loaded.tokenizer, batch_tokens=options.batch_tokens)
    print(
        f"\n{options.model}, {dtype}, {torch.get_num_threads()} threads, float32 products by {matmul_library()}, "
        f"{options.batch_tokens} tokens at once, {options.turns} turns\n"
        "case                    docs  tokens  stock s   ours s  floor s  stock / ours       ours / floor        "
        "max diff flips batch stock MB  ours MB"
    )
    timings, tables, seconds = [], [], dict.fromkeys(("stock", "ours", "stream"), 0.0)

    def compare(case: Case) -> Timing:
        timing, runs = bench.compare(case)
        if dtype == "float32":
            exact[case.name] = runs["stock"].scores
        elif case.name in exact:
            runs["stream"] = bench.ours(case, stream=True)
            tables.append({way: apart(run.scores, exact[case.name], case.sizes) for way, run in runs.items()})
            for way, run in runs.items():
                seconds[way] += run.seconds
        return timing

    spec = EvaluationSpec(tasks=COMMONSENSE, limit=options.documents)
    timings = [compare(case) for case in cases(lm, spec)]
    total = Timing.total(timings)
    print(f"{'commonsense':36}{total.line()}", flush=True)
    found = {
        "commonsense_ratio": median(total.ratios("stock", "ours")),
        "floor_ratio": median(total.ratios("ours", "floor")),
    }
    for documents in options.mmlu_documents:
        spec = EvaluationSpec(tasks=("mmlu",), mmlu_limit=documents, mmlu_num_fewshot=5)
        (case,) = cases(lm, spec, options.mmlu_subjects)
        timing = compare(case)
        found[f"mmlu_{documents}_ratio"] = found["mmlu_ratio"] = median(timing.ratios("stock", "ours"))
        found["mmlu_floor_ratio"] = median(timing.ratios("ours", "floor"))
    if tables:
        found |= print_table(tables, seconds)
    return {name: round(value, 4) for name, value in found.items()}


def numbers(text: str) -> list[int]:
    """``2,10`` -> [2, 10]."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=100, help="documents of each commonsense task")
    parser.add_argument("--mmlu-subjects", type=int, default=4)
    parser.add_argument("--mmlu-documents", type=numbers, default=[2, 10], help="a subject; mmlu_ratio is the last's")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--turns", type=int, default=3, help="how often each side runs")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--stock-batch-sizes", type=numbers, default=[8, 16], help="the fastest of them counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where other programs run beside this one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with quiet():
        exact: dict[str, Scores] = {}
        ratios = {}
        for dtype in options.dtypes.split(","):
            if dtype == "bfloat16" and fast_dtype("cpu") != dtype:
                print("\nno bfloat16 instructions here: products in float32, rounded once; the seconds say nothing")
                with float32_products():
                    ratios[dtype] = run(dtype, options, exact)
            else:
                ratios[dtype] = run(dtype, options, exact)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
