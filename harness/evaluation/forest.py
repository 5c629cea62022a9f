"""Lays token sequences out so that what they share is run once: one forest of tokens, cut into chunks and blocks.

The sorted sequences form a forest (shared beginnings are shared nodes). Its nodes are numbered in preorder, so that
node ``a`` is an ancestor of node ``b``, or ``b`` itself, exactly where ``a <= b <= last[a]``. Two things follow. The
stream of nodes can be cut anywhere into chunks of any size: what a chunk needs of the earlier ones is the path to its
first node, nothing else. And which key a query may see is two comparisons, whatever the shape of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# What attention costs beside its query-key pairs, in pairs: measured on a CPU, and only there to choose between cuts.
_PAIRS_PER_KEY = 16
_PAIRS_PER_BLOCK = 512
_PAIRS_PER_CALL = 4096
_LONGEST_RUN = 128
_MOST_CUTS_IN_A_BLOCK = 64


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


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Pieces of a chunk whose attention runs in one call, padded to the largest of them.

    Keys are numbered within ``carried path + chunk``, queries within the chunk; -1 is padding.
    """

    queries: Ints
    """[num_blocks, longest_query]"""
    keys: Ints
    """[num_blocks, longest_key]"""
    visible: NDArray[np.bool_]
    """[num_blocks, longest_query, longest_key]; a padded query sees the first key, so that its softmax is finite."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive nodes that are run in one forward pass."""

    start: int
    end: int
    num_carried: int
    """Nodes of the path to the first node, whose keys and values come from earlier chunks."""
    carry_out: Ints
    """What the next chunk needs, numbered within ``carried path + chunk``."""
    groups: tuple[BlockGroup, ...]


def cut(forest: Forest, budget: int) -> list[Chunk]:
    """The forest as chunks of at most ``budget`` nodes (and of nearly equal size)."""
    edges = _chunk_edges(forest, budget)
    chunks = []
    for start, end in pairwise(edges):
        carried = int(forest.position[start])
        next_path = forest.path(end) if end < forest.num_nodes else np.empty(0, np.int64)
        chunks.append(
            Chunk(
                start=start,
                end=end,
                num_carried=carried,
                carry_out=_within(forest, next_path, start, carried),
                groups=tuple(_groups(forest, start, end, carried)),
            )
        )
    return chunks


def _chunk_edges(forest: Forest, budget: int) -> list[int]:
    """Cuts near equal sizes, each where the path that must be carried over is short."""
    num_chunks = -(-forest.num_nodes // budget)
    size = -(-forest.num_nodes // num_chunks)
    edges = [0]
    while (left := forest.num_nodes - edges[-1]) > budget:
        most = min(budget, left)
        least = max(1, int(min(size, most) * 0.85))
        window = np.arange(edges[-1] + least, edges[-1] + most + 1)
        depth = forest.position[np.minimum(window, forest.num_nodes - 1)]
        # Ties go to the longest chunk: the last of the smallest depths.
        edges.append(int(window[len(window) - 1 - np.argmin(depth[::-1])]))
    return [*edges, forest.num_nodes]


def _within(forest: Forest, nodes: Ints, start: int, carried: int) -> Ints:
    """Nodes numbered within ``carried path + chunk``; a carried node stands at its position in the path."""
    return np.where(nodes >= start, nodes - start + carried, forest.position[nodes])


def _groups(forest: Forest, start: int, end: int, carried: int) -> list[BlockGroup]:
    """The blocks of a chunk, those of like size together."""
    blocks = _blocks(forest, start, end)
    keys = [np.concatenate([forest.path(a), np.arange(a, b)]) for a, b in blocks]
    sizes = [(len(k), b - a) for k, (a, b) in zip(keys, blocks, strict=True)]
    by_size = sorted(range(len(blocks)), key=lambda i: sizes[i], reverse=True)
    groups: list[list[int]] = []
    for i in by_size:
        if groups and _padding(sizes, [*groups[-1], i]) - _padding(sizes, groups[-1]) <= _PAIRS_PER_CALL:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_pad(forest, [blocks[i] for i in g], [keys[i] for i in g], start, carried) for g in groups]


def _padding(sizes: list[tuple[int, int]], group: list[int]) -> int:
    """Query-key pairs that a group computes for nothing."""
    most_keys = max(sizes[i][0] for i in group)
    most_queries = max(sizes[i][1] for i in group)
    return sum(most_keys * most_queries - sizes[i][0] * sizes[i][1] for i in group)


def _pad(forest: Forest, blocks: list[tuple[int, int]], keys: list[Ints], start: int, carried: int) -> BlockGroup:
    longest_query = max(b - a for a, b in blocks)
    longest_key = max(len(k) for k in keys)
    query_index = np.full((len(blocks), longest_query), -1)
    key_index = np.full((len(blocks), longest_key), -1)
    visible = np.zeros((len(blocks), longest_query, longest_key), np.bool_)
    for i, ((a, b), nodes) in enumerate(zip(blocks, keys, strict=True)):
        queries = np.arange(a, b)
        query_index[i, : b - a] = queries - start
        key_index[i, : len(nodes)] = _within(forest, nodes, start, carried)
        visible[i, : b - a, : len(nodes)] = (nodes <= queries[:, None]) & (queries[:, None] <= forest.last[nodes])
        visible[i, b - a :, 0] = True
    return BlockGroup(query_index, key_index, visible)


def _blocks(forest: Forest, start: int, end: int) -> list[tuple[int, int]]:
    """Cuts a chunk into blocks so that the attention over all of them costs least (dynamic programming over cuts)."""
    runs = np.unique(forest.run_start[start:end])
    edges = sorted({start, end, *(int(r) for r in runs if r > start), *_inside_long_runs(forest, start, end)})
    cuts = np.array(edges)
    carried = forest.position[cuts[:-1]]
    cost = np.zeros(len(cuts))
    best = np.zeros(len(cuts), np.int64)
    for j in range(1, len(cuts)):
        first = max(0, j - _MOST_CUTS_IN_A_BLOCK)
        queries = cuts[j] - cuts[first:j]
        keys = queries + carried[first:j]
        costs = cost[first:j] + queries * keys + _PAIRS_PER_KEY * keys + _PAIRS_PER_BLOCK
        best[j] = first + int(np.argmin(costs))
        cost[j] = costs.min()
    blocks = []
    j = len(cuts) - 1
    while j > 0:
        blocks.append((int(cuts[best[j]]), int(cuts[j])))
        j = int(best[j])
    return blocks[::-1]


def _inside_long_runs(forest: Forest, start: int, end: int) -> list[int]:
    """Cuts inside unbranched runs, whose upper triangle would otherwise be computed for nothing."""
    inside = (np.arange(start, end) - np.maximum(forest.run_start[start:end], start)) % _LONGEST_RUN == 0
    return [int(n) for n in np.flatnonzero(inside) + start]
