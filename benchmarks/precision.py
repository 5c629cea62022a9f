"""The second table of scoring.py: what bfloat16 does to log-likelihoods and answers, three ways of computing in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, bfloat16
from torch.nn import functional

Scores = list[tuple[float, bool]]

LABELS = {"stock": "stock, bfloat16 throughout", "ours": "ours, float32 head", "stream": "ours, float32 stream too"}


@contextmanager
def float32_products() -> Iterator[None]:
    """Within it bfloat16 products are computed in float32 and rounded once, as bfloat16 instructions do.

    For processors without such instructions: the numbers are those of bfloat16, the time is not.
    """
    linear, attention = functional.linear, functional.scaled_dot_product_attention

    def rounded(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(*tensors: Tensor, **options: Any) -> Tensor:
            if tensors[0].dtype != bfloat16:
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


def flips(one: Scores, other: Scores, sizes: list[int]) -> int:
    """Documents whose best choice differs; ``sizes[i]`` choices belong to document i."""
    return sum(a != b for a, b in zip(_answers(one, sizes), _answers(other, sizes), strict=True))


def apart(scores: Scores, exact: Scores, sizes: list[int]) -> dict[str, float]:
    """How far scores are from the exact ones, as sums over documents and choices (but for the maximum)."""
    differences = [abs(a - b) for (a, _), (b, _) in zip(scores, exact, strict=True)]
    return {
        "sum": sum(differences),
        "choices": len(differences),
        "max": max(differences),
        "flips": flips(scores, exact, sizes),
        "ties": sum(choices.count(max(choices)) > 1 for choices in _by_document(scores, sizes)),
        "documents": len(sizes),
    }


def print_table(cases: list[dict[str, dict[str, float]]], seconds: dict[str, float]) -> dict[str, float]:
    """Print the table over all cases (way -> what `apart` says); what of it goes into the JSON object."""
    print("\nagainst stock in float32     seconds  mean diff  max diff  flips in 100  ties in 100")
    summary: dict[str, float] = {}
    for way, label in LABELS.items():
        total = {key: sum(case[way][key] for case in cases) for key in ("sum", "choices", "flips", "ties", "documents")}
        mean = total["sum"] / total["choices"]
        highest = max(case[way]["max"] for case in cases)
        flipped, tied = (100 * total[key] / total["documents"] for key in ("flips", "ties"))
        print(f"{label:26} {seconds[way]:9.1f} {mean:10.4f} {highest:9.2f} {flipped:13.2f} {tied:12.2f}", flush=True)
        summary |= {f"{way}_seconds": seconds[way], f"{way}_mean_difference": mean, f"{way}_flips_in_100": flipped}
    return summary


def _by_document(scores: Scores, sizes: list[int]) -> Iterator[list[float]]:
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        yield [ll for ll, _ in scores[end - size : end]]


def _answers(scores: Scores, sizes: list[int]) -> list[int]:
    return [int(np.argmax(choices)) for choices in _by_document(scores, sizes)]
