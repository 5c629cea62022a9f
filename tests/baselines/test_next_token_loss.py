"""The chunked loss against torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch

from baselines.next_token_loss import LOGIT_TOKENS, next_token_loss


@pytest.mark.parametrize("num_tokens", [1, LOGIT_TOKENS, 2 * LOGIT_TOKENS + 3])
def test_loss_and_gradient_equal_cross_entropy(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 11, (num_tokens,), generator=generator)
    weight = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    loss, plain = next_token_loss(hidden, head, target, weight)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    nats = torch.nn.functional.cross_entropy(hidden @ head.T, target, reduction="none")
    (expected,) = torch.autograd.grad(3 * (nats * weight).sum(), hidden)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss, (nats * weight).sum())
    torch.testing.assert_close(plain, nats.sum())


def test_the_head_gets_no_gradient() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    head = torch.randn(11, 8, requires_grad=True)
    loss, _ = next_token_loss(hidden, head, torch.zeros(5, dtype=torch.int64), torch.ones(5))
    torch.autograd.backward(loss)
    assert hidden.grad is not None
    assert head.grad is None


def test_a_head_of_another_dtype_is_cast_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baselines.next_token_loss.HEAD_ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 8, generator=generator, requires_grad=True)
    head = torch.randn(11, 8, generator=generator).bfloat16()
    target, weight = torch.randint(0, 11, (7,), generator=generator), torch.rand(7, generator=generator)
    losses = [next_token_loss(hidden, some, target, weight)[0] for some in (head, head.float())]
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
