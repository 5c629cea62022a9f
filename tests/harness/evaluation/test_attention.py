"""Attention to a path that many tokens see: two ways to the same output and sums."""

from __future__ import annotations

import pytest
import torch

from harness.evaluation.attention import _attend_by_products, _attend_summed


@pytest.mark.parametrize(("heads", "groups", "queries", "keys"), [(9, 3, 1500, 40), (4, 4, 3, 200), (2, 1, 1, 1)])
def test_attention_by_products_is_that_of_pytorch(heads: int, groups: int, queries: int, keys: int) -> None:
    query = 5 * torch.randn(1, heads, queries, 64)
    key, value = torch.randn(1, groups, keys, 64), torch.randn(1, groups, keys, 64)
    found = _attend_by_products(query, key, value, scale=0.125)
    expected = _attend_summed(query, key, value, scale=0.125)
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.log_sum, expected.log_sum)


def test_scores_far_apart_do_not_overflow() -> None:
    query, key = torch.full((1, 1, 2, 64), 30.0), torch.randn(1, 1, 5, 64).cumsum(2) * 30
    found = _attend_by_products(query, key, torch.randn(1, 1, 5, 64), scale=1.0)
    assert torch.isfinite(found.out).all()
    assert torch.isfinite(found.log_sum).all()
