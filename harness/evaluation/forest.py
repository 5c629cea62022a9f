"""Lays token sequences out so that what they share is run once: one forest of tokens.

The sorted sequences form a forest (shared beginnings are shared nodes). Its nodes are numbered in preorder, so that
node ``a`` is an ancestor of node ``b``, or ``b`` itself, exactly where ``a <= b <= last[a]``. Two things follow. The
stream of nodes can be cut anywhere into chunks of any size: what a chunk needs of the earlier ones is the path to its
first node, nothing else. And which key a query may see is two comparisons, whatever the shape of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Forest:
    """Distinct tokens of many sequences, in preorder; all arrays are ``[num_nodes]``."""

    token: Ints
    position: Ints
    """Distance from the root: the position id, and the number of ancestors."""
    last: Ints
    """The last node of the subtree."""
    run_start: Ints
    """The first node of the unbranched run (one sequence's own tail) that holds the node."""
    parent: Ints
    """The node before it in its sequence; -1 at a root."""
    nodes_of: tuple[Ints, ...]
    """Sequence, in the order given -> the nodes of its last ``tail`` tokens."""

    @property
    def num_nodes(self) -> int:
        """Tokens to run."""
        return len(self.token)

    def path(self, node: int) -> Ints:
        """The ancestors of a node, from the root down, without the node itself."""
        pieces: list[Ints] = []
        start = int(self.run_start[node])
        pieces.append(np.arange(start, node))
        while (above := int(self.parent[start])) >= 0:
            start = int(self.run_start[above])
            pieces.append(np.arange(start, above + 1))
        return np.concatenate(pieces[::-1])


def grow(sequences: Sequence[Ints], tails: Sequence[int]) -> Forest:
    """The forest of some non-empty sequences of token ids, and where the last ``tails[i]`` tokens of each lie in it."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">u4").tobytes())
    pieces: list[tuple[Ints, int, int, int]] = []  # tokens, first position, first node, parent
    nodes_of: list[Ints] = [np.empty(0, np.int64)] * len(sequences)
    longest = max(len(s) for s in sequences)
    path = np.empty(longest, np.int64)
    total = sum(len(s) for s in sequences)
    last = np.empty(total, np.int64)
    previous = np.empty(0, np.int64)
    num_nodes = 0
    for i in order:
        sequence = sequences[i]
        shared = _shared_length(previous, sequence)
        if shared < len(sequence):
            last[path[shared : len(previous)]] = num_nodes - 1
            pieces.append((sequence[shared:], shared, num_nodes, int(path[shared - 1]) if shared else -1))
            path[shared : len(sequence)] = np.arange(num_nodes, num_nodes + len(sequence) - shared)
            num_nodes += len(sequence) - shared
            previous = sequence
        nodes_of[i] = path[len(sequence) - tails[i] : len(sequence)].copy()
    last[path[: len(previous)]] = num_nodes - 1
    run_start = np.concatenate([np.full(len(tokens), first) for tokens, _, first, _ in pieces])
    parent = np.arange(-1, num_nodes - 1)
    parent[[first for _, _, first, _ in pieces]] = [above for *_, above in pieces]
    return Forest(
        token=np.concatenate([tokens for tokens, *_ in pieces]),
        position=np.concatenate([np.arange(start, start + len(tokens)) for tokens, start, *_ in pieces]),
        last=last[:num_nodes].copy(),
        run_start=run_start,
        parent=parent,
        nodes_of=tuple(nodes_of),
    )


def _shared_length(one: Ints, other: Ints) -> int:
    """How many tokens two sequences share from the start."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
