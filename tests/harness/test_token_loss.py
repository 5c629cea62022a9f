"""The chunked loss against torch's own, alone and beside a teacher's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from harness.token_loss import LOGIT_TOKENS, Teacher, token_loss


@pytest.mark.parametrize("num_tokens", [1, LOGIT_TOKENS, 2 * LOGIT_TOKENS + 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_torchs(num_tokens: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, head = draw(num_tokens, 8).requires_grad_(), draw(11, 8).requires_grad_()
    known, known_head = draw(num_tokens, 6), draw(11, 6)
    target, weight = torch.randint(0, 11, (num_tokens,), generator=generator), draw(num_tokens).abs()
    teacher = Teacher(known, known_head, 2.0, share) if share else None
    loss, plain = token_loss(hidden, head, target, weight, teacher)
    logits = hidden @ head.T
    nats = functional.cross_entropy(logits, target, reduction="none")
    divergence = functional.kl_div(
        (logits / 2).log_softmax(-1), (known @ known_head.T / 2).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    expected = (((1 - share) * nats + share * 4 * divergence) * weight).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(plain, nats.sum())
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, (hidden, head)), torch.autograd.grad(3 * expected, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_head_that_learns_nothing_gets_no_gradient() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    head = torch.randn(11, 8, requires_grad=True)
    loss, _ = token_loss(hidden, head.detach(), torch.zeros(5, dtype=torch.int64), torch.ones(5))
    torch.autograd.backward(loss)
    assert hidden.grad is not None
    assert head.grad is None


def test_a_head_of_another_dtype_is_cast_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.token_loss.VOCABULARY_ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 8, generator=generator, requires_grad=True)
    head = torch.randn(11, 8, generator=generator).bfloat16()
    target, weight = torch.randint(0, 11, (7,), generator=generator), torch.rand(7, generator=generator)
    losses = [token_loss(hidden, some, target, weight)[0] for some in (head, head.float())]
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
