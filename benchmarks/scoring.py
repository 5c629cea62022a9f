"""Times the scorer against stock lm-eval and against the floor: same process, requests, model and threads.

    python benchmarks/scoring.py                                   # 100 documents a task, 20 minutes on 2 cores
    python benchmarks/scoring.py --documents 20 --mmlu-subjects 2  # a first impression

Floor: the distinct tokens through the blocks at the speed of a plain batched forward pass, plus the output head at the
scored positions. Memory is the growth of the resident set while a side runs, sampled. In bfloat16 a second table says
how far each way of computing is from stock lm-eval in float32: stock bfloat16 (logits too), ours with the float32 head,
and ours with the residual stream, norms and attention in float32 as well. The last line is one JSON object.
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
from typing import Any

import numpy as np
import psutil
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional

from harness.evaluation.forest import grow
from harness.evaluation.precision import float32_stream
from harness.evaluation.quiet import quiet, templates_compiled_once
from harness.evaluation.scorer import Request, TrieScorer
from harness.evaluation.tasks import COMMONSENSE, build_tasks
from harness.models import load_model
from harness.models.loading import fast_dtype
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


def answers(scores: Scores, sizes: list[int]) -> list[int]:
    """The best choice of every document."""
    ends = np.cumsum(sizes)
    return [int(np.argmax([ll for ll, _ in scores[end - n : end]])) for n, end in zip(sizes, ends, strict=True)]


def flips(one: Scores, other: Scores, sizes: list[int]) -> int:
    """Documents whose best choice differs."""
    return sum(a != b for a, b in zip(answers(one, sizes), answers(other, sizes), strict=True))


def ties(scores: Scores, sizes: list[int]) -> int:
    """Documents without a single best choice."""
    ends = np.cumsum(sizes)
    choices = [[ll for ll, _ in scores[end - n : end]] for n, end in zip(sizes, ends, strict=True)]
    return sum(lls.count(max(lls)) > 1 for lls in choices)


def scored_by_us(model: Any, tokenizer: Any, case: Case, options: argparse.Namespace, *, stream: bool) -> Side:
    """Our scorer, with the residual stream of a bfloat16 model in float32 or not."""
    with float32_stream(model) if stream else nullcontext():
        lm = TrieScorer(model, tokenizer, batch_tokens=options.batch_tokens)
        assert lm.why_not_fast is None, lm.why_not_fast
        with measured(CLOCKS[options.clock]) as side:
            side.scores = lm._loglikelihood_tokens(case.requests)
    return side


@contextmanager
def float32_products() -> Iterator[None]:
    """Within it bfloat16 products are computed in float32 and rounded once, as bfloat16 instructions do.

    For processors without such instructions: the numbers are those of bfloat16, the time is not.
    """
    linear, attention = functional.linear, functional.scaled_dot_product_attention

    def rounded(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(*tensors: Tensor, **options: Any) -> Tensor:
            if tensors[0].dtype != torch.bfloat16:
                return product(*tensors, **options)
            options = {
                k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()
            }
            return product(*(t if t is None else t.float() for t in tensors), **options).bfloat16()

        return compute

    functional.linear, functional.scaled_dot_product_attention = rounded(linear), rounded(attention)
    try:
        yield
    finally:
        functional.linear, functional.scaled_dot_product_attention = linear, attention


def compare(
    model: Any, tokenizer: Any, case: Case, options: argparse.Namespace, exact: dict[str, Scores]
) -> dict[str, float]:
    """Both sides and the floor on one case; prints a line. ``exact`` holds stock's float32 scores by case."""
    clock = CLOCKS[options.clock]
    stock = best_of_stock(model, tokenizer, case, options.stock_batch_sizes, clock)
    head = scored_by_us(model, tokenizer, case, options, stream=False)
    floor, tokens = floor_seconds(model, case, options.batch_tokens, clock)
    if model.dtype == torch.float32:
        exact[case.name] = stock.scores
    difference = max(abs(a - b) for (a, _), (b, _) in zip(stock.scores, head.scores, strict=True))
    print(
        f"{case.name:22} {len(case.sizes):5} {tokens:7,} {stock.seconds:8.1f} {head.seconds:8.1f} {floor:8.1f} "
        f"{stock.seconds / head.seconds:6.2f} {head.seconds / floor:6.2f} {difference:9.1e} "
        f"{flips(stock.scores, head.scores, case.sizes):5} {stock.grown_bytes / 2**20:8,.0f} "
        f"{head.grown_bytes / 2**20:8,.0f}",
        flush=True,
    )
    found = {"stock": stock.seconds, "ours": head.seconds, "floor": floor}
    if model.dtype == torch.bfloat16 and case.name in exact:
        stream = scored_by_us(model, tokenizer, case, options, stream=True)
        found["stream"] = stream.seconds
        for name, side in (("stock", stock), ("head", head), ("stream", stream)):
            found |= {f"{name} {key}": value for key, value in apart(side.scores, exact[case.name], case.sizes).items()}
    return found


def apart(scores: Scores, exact: Scores, sizes: list[int]) -> dict[str, float]:
    """How far scores are from the exact ones, as sums over documents and choices (but for the maximum)."""
    differences = [abs(a - b) for (a, _), (b, _) in zip(scores, exact, strict=True)]
    return {
        "sum": sum(differences),
        "choices": len(differences),
        "max": max(differences),
        "flips": flips(scores, exact, sizes),
        "ties": ties(scores, sizes),
        "documents": len(sizes),
    }


def print_precision(parts: list[dict[str, float]]) -> dict[str, float]:
    """The second table of a bfloat16 run, over all cases; what of it goes into the JSON object."""
    if "stream" not in parts[0]:
        return {}
    print("\nagainst stock in float32     seconds  mean diff  max diff  flips in 100  ties in 100")
    summary: dict[str, float] = {}
    for name, seconds in (("stock", "stock"), ("head", "ours"), ("stream", "stream")):
        total = {
            key: sum(part[f"{name} {key}"] for part in parts)
            for key in ("sum", "choices", "flips", "ties", "documents")
        }
        mean = total["sum"] / total["choices"]
        highest = max(part[f"{name} max"] for part in parts)
        shares = [100 * total[key] / total["documents"] for key in ("flips", "ties")]
        took = sum(part[seconds] for part in parts)
        print(
            f"{LABELS[name]:26} {took:9.1f} {mean:10.4f} {highest:9.2f} {shares[0]:13.2f} {shares[1]:12.2f}", flush=True
        )
        summary |= {f"{name}_seconds": took, f"{name}_mean_difference": mean, f"{name}_flips_in_100": shares[0]}
    return summary


LABELS = {"stock": "stock, bfloat16 throughout", "head": "ours, float32 head", "stream": "ours, float32 stream too"}


def run(dtype: str, options: argparse.Namespace, exact: dict[str, Scores]) -> dict[str, float]:
    """All cases in one dtype, and the ratios."""
    loaded = load_model(ModelRef(name=options.model), dtype)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    lm = TrieScorer(model, tokenizer, batch_tokens=options.batch_tokens)
    print(f"\n{options.model}, {dtype}, {torch.get_num_threads()} threads, {options.batch_tokens} tokens at once")
    print(
        "case                    docs  tokens  stock s   ours s  floor s  ratio /floor  max diff flips stock MB ours MB"
    )
    spec = EvaluationSpec(tasks=COMMONSENSE, limit=options.documents)
    parts = [compare(model, tokenizer, case, options, exact) for case in cases(lm, spec)]
    total = {side: sum(part[side] for part in parts) for side in ("stock", "ours", "floor")}
    print(
        f"{'commonsense':36} {total['stock']:8.1f} {total['ours']:8.1f} {total['floor']:8.1f} "
        f"{total['stock'] / total['ours']:6.2f} {total['ours'] / total['floor']:6.2f}",
        flush=True,
    )
    found = {"commonsense_ratio": total["stock"] / total["ours"], "floor_ratio": total["ours"] / total["floor"]}
    for documents in options.mmlu_documents:
        spec = EvaluationSpec(tasks=("mmlu",), mmlu_limit=documents, mmlu_num_fewshot=5)
        (case,) = cases(lm, spec, options.mmlu_subjects)
        part = compare(model, tokenizer, case, options, exact)
        parts.append(part)
        found[f"mmlu_{documents}_ratio"] = found["mmlu_ratio"] = part["stock"] / part["ours"]
        found["mmlu_floor_ratio"] = part["ours"] / part["floor"]
    found |= print_precision(parts)
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
