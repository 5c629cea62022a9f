"""Times the scorer against stock lm-eval and against the floor: same process, requests, model and threads.

    python benchmarks/scoring.py                                   # 100 documents a task, 20 minutes on 2 cores
    python benchmarks/scoring.py --documents 20 --mmlu-subjects 2  # a first impression

Floor: the distinct tokens through the blocks at the speed of a plain batched forward pass, plus the output head at the
scored positions. Memory is the growth of the resident set while a side runs, sampled. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from lm_eval.models.huggingface import HFLM

from harness.evaluation.forest import grow
from harness.evaluation.quiet import quiet, templates_compiled_once
from harness.evaluation.scorer import Request, TrieScorer
from harness.evaluation.tasks import COMMONSENSE, build_tasks
from harness.models import load_model
from harness.records import EvaluationSpec, ModelRef

Scores = list[tuple[float, bool]]
Clock = Callable[[], float]


@dataclass
class Case:
    """Requests of one document set; ``sizes[i]`` choices belong to document i."""

    name: str
    requests: list[Request]
    sizes: list[int]


@dataclass
class Side:
    """What running one side took."""

    seconds: float = 0.0
    grown_bytes: int = 0
    scores: Scores = field(default_factory=list)


CLOCKS: dict[str, Clock] = {
    "wall": time.perf_counter,
    "cpu": lambda: time.process_time() / torch.get_num_threads(),
}


@contextmanager
def measured(clock: Clock) -> Iterator[Side]:
    """Time, and by how much the resident set grew at most (sampled every 20 ms)."""
    side, process, done = Side(), psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        while not done.wait(0.02):
            side.grown_bytes = max(side.grown_bytes, process.memory_info().rss - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = clock()
    yield side
    side.seconds = clock() - start
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


def best_of_stock(model: Any, tokenizer: Any, case: Case, batch_sizes: list[int], clock: Clock) -> Side:
    """Stock HFLM at the fastest of some batch sizes."""
    sides = []
    for batch_size in batch_sizes:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        with measured(clock) as side:
            side.scores = lm._loglikelihood_tokens(case.requests, disable_tqdm=True)
        sides.append(side)
    return min(sides, key=lambda side: side.seconds)


def floor_seconds(model: Any, case: Case, batch_tokens: int, clock: Clock) -> tuple[float, int]:
    """Seconds of the floor, and the distinct tokens; the fastest of some shapes of batch is taken."""
    inputs = [np.array(context + continuation[:-1]) for _, context, continuation in case.requests]
    forest = grow(inputs, [len(continuation) for *_, continuation in case.requests])
    scored = len(np.unique(np.concatenate(forest.nodes_of)))
    typical = int(np.median([len(i) for i in inputs]))
    rows = max(1, min(batch_tokens, forest.num_nodes) // typical)
    head = model.get_output_embeddings()
    tokens = torch.randint(0, head.out_features, (rows, typical))
    hidden = torch.randn(min(1024, scored), head.in_features, dtype=head.weight.dtype)
    with torch.no_grad():
        per_token = fastest(lambda: model.base_model(tokens, use_cache=False), clock) / tokens.numel()
        per_row = fastest(lambda: head(hidden), clock) / len(hidden)
    return per_token * forest.num_nodes + per_row * scored, forest.num_nodes


def fastest(run: Callable[[], object], clock: Clock, repeats: int = 3) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def flips(one: Scores, other: Scores, sizes: list[int]) -> int:
    """Documents whose best choice differs."""
    ends = np.cumsum(sizes)
    return sum(
        int(np.argmax([ll for ll, _ in one[end - n : end]]) != np.argmax([ll for ll, _ in other[end - n : end]]))
        for n, end in zip(sizes, ends, strict=True)
    )


def compare(model: Any, tokenizer: Any, case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Both sides and the floor on one case; prints a line."""
    clock = CLOCKS[options.clock]
    stock = best_of_stock(model, tokenizer, case, options.stock_batch_sizes, clock)
    lm = TrieScorer(model, tokenizer, batch_tokens=options.batch_tokens)
    assert lm.why_not_fast is None, lm.why_not_fast
    with measured(clock) as ours:
        ours.scores = lm._loglikelihood_tokens(case.requests)
    floor, tokens = floor_seconds(model, case, options.batch_tokens, clock)
    difference = max(abs(a - b) for (a, _), (b, _) in zip(stock.scores, ours.scores, strict=True))
    print(
        f"{case.name:22} {len(case.sizes):5} {tokens:7,} {stock.seconds:8.1f} {ours.seconds:8.1f} {floor:8.1f} "
        f"{stock.seconds / ours.seconds:6.2f} {ours.seconds / floor:6.2f} {difference:9.1e} "
        f"{flips(stock.scores, ours.scores, case.sizes):5} {stock.grown_bytes / 2**20:8,.0f} "
        f"{ours.grown_bytes / 2**20:8,.0f}",
        flush=True,
    )
    return {"stock": stock.seconds, "ours": ours.seconds, "floor": floor}


def run(dtype: str, options: argparse.Namespace) -> dict[str, float]:
    """All cases in one dtype, and the ratios."""
    loaded = load_model(ModelRef(name=options.model), dtype)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    lm = TrieScorer(model, tokenizer, batch_tokens=options.batch_tokens)
    print(f"\n{options.model}, {dtype}, {torch.get_num_threads()} threads, {options.batch_tokens} tokens at once")
    print(
        "case                    docs  tokens  stock s   ours s  floor s  ratio /floor  max diff flips stock MB ours MB"
    )
    spec = EvaluationSpec(tasks=COMMONSENSE, limit=options.documents)
    suite = [compare(model, tokenizer, case, options) for case in cases(lm, spec)]
    total = {side: sum(part[side] for part in suite) for side in suite[0]}
    found = {"commonsense_ratio": total["stock"] / total["ours"], "floor_ratio": total["ours"] / total["floor"]}
    for documents in options.mmlu_documents:
        spec = EvaluationSpec(tasks=("mmlu",), mmlu_limit=documents, mmlu_num_fewshot=5)
        (case,) = cases(lm, spec, options.mmlu_subjects)
        part = compare(model, tokenizer, case, options)
        found[f"mmlu_{documents}_ratio"] = found["mmlu_ratio"] = part["stock"] / part["ours"]
        found["mmlu_floor_ratio"] = part["ours"] / part["floor"]
    return {name: round(value, 3) for name, value in found.items()}


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
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--stock-batch-sizes", type=numbers, default=[8, 16], help="the fastest of them counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where other programs run beside this one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with quiet():
        ratios = {dtype: run(dtype, options) for dtype in options.dtypes.split(",")}
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
