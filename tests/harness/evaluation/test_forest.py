"""The layout of shared tokens: what is run once, what sees what, and that cutting changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.evaluation.chunks import Chunk, cut
from harness.evaluation.forest import Forest, grow

SEQUENCES = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8], [5], [2, 3]]
# Sorted: 2 3 | 5 | 5 6 7 8 | 5 6 9. Nodes: 0=2 1=3 | 2=5 | 3=6 4=7 5=8 | 6=9.


def forest_of(sequences: list[list[int]], tails: list[int] | None = None) -> Forest:
    arrays = [np.array(s, np.int64) for s in sequences]
    return grow(arrays, tails or [1] * len(arrays))


def seen(forest: Forest, chunks: list[Chunk]) -> dict[int, set[int]]:
    """Node -> the nodes it attends to, read off the chunks as the attention would."""
    found: dict[int, set[int]] = {}
    carried = np.empty(0, np.int64)
    for chunk in chunks:
        numbered = np.concatenate([carried, np.arange(chunk.start, chunk.end)])
        assert chunk.num_carried == len(carried)
        for group in chunk.groups:
            for queries, keys, visible in zip(group.queries, group.keys, group.visible, strict=True):
                for query, row in zip(queries, visible, strict=True):
                    if query >= 0:
                        found[chunk.start + int(query)] = {int(numbered[k]) for k in keys[row]}
        for trunk in chunk.trunks:
            for query in range(chunk.start + trunk.start, chunk.start + trunk.end):
                more = {int(numbered[k]) for k in trunk.keys}
                assert not more & found[query], "a key in a trunk and in a block"
                found[query] |= more
        carried = numbered[chunk.carry_out]
    return found


def ancestors_by_walking(sequences: list[list[int]], forest: Forest) -> dict[int, set[int]]:
    """The same from whole sequences: every token sees itself and the tokens before it."""
    whole = forest_of(sequences, [len(s) for s in sequences])
    assert np.array_equal(whole.token, forest.token)
    return {int(node): set(map(int, nodes[: i + 1])) for nodes in whole.nodes_of for i, node in enumerate(nodes)}


def test_what_sequences_share_is_one_node() -> None:
    forest = forest_of(SEQUENCES)
    assert forest.token.tolist() == [2, 3, 5, 6, 7, 8, 9]
    assert forest.position.tolist() == [0, 1, 0, 1, 2, 3, 2]
    assert forest.last.tolist() == [1, 1, 6, 6, 5, 5, 6]
    assert [nodes.tolist() for nodes in forest.nodes_of] == [[5], [6], [5], [2], [1]]


def test_the_path_to_a_node_is_its_ancestors() -> None:
    forest = forest_of(SEQUENCES)
    assert [forest.path(node).tolist() for node in range(7)] == [[], [0], [], [2], [2, 3], [2, 3, 4], [2, 3]]


def test_a_tail_may_lie_in_what_is_shared() -> None:
    forest = forest_of([[1, 2, 3], [1, 2, 3, 4], [1, 2, 5]], tails=[2, 4, 3])
    assert [nodes.tolist() for nodes in forest.nodes_of] == [[1, 2], [0, 1, 2, 3], [0, 1, 4]]


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 100])
def test_chunks_cover_the_forest_within_the_budget(budget: int) -> None:
    forest = forest_of(SEQUENCES)
    chunks = cut(forest, budget)
    assert [chunk.start for chunk in chunks[1:]] == [chunk.end for chunk in chunks[:-1]]
    assert (chunks[0].start, chunks[-1].end) == (0, 7)
    assert all(0 < chunk.end - chunk.start <= budget for chunk in chunks)
    assert chunks[-1].carry_out.size == 0


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(1, 30),
    st.sampled_from([None, 1, 2, 4]),
)
@settings(max_examples=300, deadline=None)
def test_every_token_sees_its_own_sequence_and_nothing_else(
    sequences: list[list[int]], budget: int, shortest_trunk: int | None
) -> None:
    forest = forest_of(sequences)
    assert seen(forest, cut(forest, budget, shortest_trunk)) == ancestors_by_walking(sequences, forest)


def test_what_many_see_is_a_trunk_and_in_no_block() -> None:
    shared = list(range(100, 130))
    forest = forest_of([[*shared, i, *range(200, 205)] for i in range(10)] + [[1, 2, 3]])
    (chunk,) = cut(forest, 1000, shortest_trunk=20)
    (trunk,) = chunk.trunks
    assert (trunk.end - trunk.start, len(trunk.keys)) == (60, 30)
    (whole,) = cut(forest, 1000)
    pairs, pairs_without = (sum(group.visible.size for group in c.groups) for c in (chunk, whole))
    assert pairs <= pairs_without - 60 * 30
    assert cut(forest, 1000, shortest_trunk=31)[0].trunks == whole.trunks == ()


def test_long_runs_are_cut_so_that_half_the_square_is_not_computed_for_nothing() -> None:
    forest = forest_of([list(range(1024))])
    pairs = sum(group.visible.size for chunk in cut(forest, 1024) for group in chunk.groups)
    assert pairs < 0.75 * 1024**2


def test_a_padded_query_sees_a_key_so_that_its_softmax_is_finite() -> None:
    forest = forest_of([[0, *range(10, 16)], [1, *range(10, 14)], [2, *range(10, 12)]])
    groups = [group for chunk in cut(forest, 100) for group in chunk.groups]
    assert all(group.visible.any(axis=2).all() for group in groups)
