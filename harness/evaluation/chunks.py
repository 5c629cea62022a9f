"""Cuts a token forest into chunks that are run in one pass each, and their attention into calls that waste little.

A chunk's tokens see the path to it and each other, so its attention is cut into *blocks* of neighbouring tokens with
just the keys that some of them see, and a mask. Where many of them hang below one long path, such as the worked
examples before the questions of a subject, all of them see all of it: that path is a *trunk*, attended to in one call
without a mask, and the blocks below it hold the other keys alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from harness.evaluation.forest import Forest, Ints

# What attention costs beside its query-key pairs, in pairs: measured on a CPU, and only there to choose between cuts.
_PAIRS_PER_KEY = 16
_PAIRS_PER_BLOCK = 512
_PAIRS_PER_CALL = 4096
_LONGEST_RUN = 128
_MOST_CUTS_IN_A_BLOCK = 64
SHORTEST_TRUNK = 128
"""Keys that a path must have, and queries below it, to be worth a call of its own."""


ALIGNED = 8
"""Rows that matrix libraries take at once: where it does not divide the number of tokens, oneDNN is a fifth slower."""


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
class Trunk:
    """A path that all of some neighbouring tokens see."""

    start: int
    """The first of them, numbered within the chunk."""
    end: int
    keys: Ints
    """Nodes of the path, numbered within ``carried path + chunk``."""


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
    trunks: tuple[Trunk, ...] = ()
    """Keys that the groups leave out."""

    @property
    def num_padded(self) -> int:
        """Tokens to run: the chunk's, and what makes their number even for matrix products."""
        return -(-(self.end - self.start) // ALIGNED) * ALIGNED


def cut(forest: Forest, budget: int, shortest_trunk: int | None = None) -> list[Chunk]:
    """The forest as chunks of at most ``budget`` nodes (and of nearly equal size).

    Args:
        forest: of the sequences.
        budget: nodes of a chunk at most.
        shortest_trunk: keys and queries that make a trunk; None makes none.
    """
    edges = _chunk_edges(forest, budget)
    chunks = []
    for start, end in pairwise(edges):
        carried = int(forest.position[start])
        next_path = forest.path(end) if end < forest.num_nodes else np.empty(0, np.int64)
        stretches = _stretches(forest, start, end, shortest_trunk)
        chunks.append(
            Chunk(
                start=start,
                end=end,
                num_carried=carried,
                carry_out=_within(forest, next_path, start, carried),
                groups=tuple(_groups(forest, stretches, start, carried)),
                trunks=tuple(_trunk(forest, stretch, start, carried) for stretch in stretches if stretch.depth),
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


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring nodes of a chunk that hang below one trunk, or below none."""

    start: int
    end: int
    depth: int = 0
    """Nodes of the trunk: the first so many on the path to each of them."""


def _stretches(forest: Forest, start: int, end: int, shortest_trunk: int | None) -> list[_Stretch]:
    """The chunk from its start to its end; what saves most becomes a trunk first, and trunks do not overlap."""
    below = [] if shortest_trunk is None else _below_trunks(forest, start, end, shortest_trunk)
    edges = [start, *(edge for stretch in below for edge in (stretch.start, stretch.end)), end]
    between = [_Stretch(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
    return sorted([*below, *between], key=lambda stretch: stretch.start)


def _below_trunks(forest: Forest, start: int, end: int, shortest: int) -> list[_Stretch]:
    branching = forest.parent[np.unique(forest.run_start[start:end])]
    nodes = np.unique(branching[branching >= 0])
    first, stop = np.maximum(nodes + 1, start), np.minimum(forest.last[nodes] + 1, end)
    depth, queries = forest.position[nodes] + 1, stop - first
    chosen: list[_Stretch] = []
    for i in np.argsort(-depth * queries, kind="stable"):
        apart = all(stop[i] <= other.start or other.end <= first[i] for other in chosen)
        if depth[i] >= shortest and queries[i] >= shortest and apart:
            chosen.append(_Stretch(int(first[i]), int(stop[i]), int(depth[i])))
    return sorted(chosen, key=lambda stretch: stretch.start)


def _trunk(forest: Forest, stretch: _Stretch, start: int, carried: int) -> Trunk:
    path = forest.path(stretch.start)[: stretch.depth]
    return Trunk(stretch.start - start, stretch.end - start, _within(forest, path, start, carried))


def _groups(forest: Forest, stretches: list[_Stretch], start: int, carried: int) -> list[BlockGroup]:
    """The blocks of a chunk, those of like size together."""
    blocks, keys = [], []
    for stretch in stretches:
        for a, b in _blocks(forest, stretch):
            blocks.append((a, b))
            keys.append(np.concatenate([forest.path(a)[stretch.depth :], np.arange(a, b)]))
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


def _blocks(forest: Forest, stretch: _Stretch) -> list[tuple[int, int]]:
    """Cuts a stretch into blocks so that the attention over all of them costs least (dynamic programming over cuts)."""
    start, end = stretch.start, stretch.end
    runs = np.unique(forest.run_start[start:end])
    edges = sorted({start, end, *(int(r) for r in runs if r > start), *_inside_long_runs(forest, start, end)})
    cuts = np.array(edges)
    carried = forest.position[cuts[:-1]] - stretch.depth
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
