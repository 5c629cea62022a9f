"""Log-probabilities from hidden states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.evaluation import head as head_module
from harness.evaluation.head import token_logprobs


@pytest.mark.parametrize("bias", [False, True])
def test_slices_of_rows_and_vocabulary_equal_a_whole_softmax(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_ROWS", 3)
    monkeypatch.setattr(head_module, "_VOCABULARY_SLICE", 7)
    torch.manual_seed(0)
    head = nn.Linear(5, 23, bias=bias, dtype=torch.float64)
    hidden = torch.randn(8, 5, dtype=torch.float64)
    row = torch.tensor([0, 0, 1, 2, 4, 5, 7, 7])
    expected = head(hidden).log_softmax(-1)
    token = expected.argmax(-1)[row].clone()
    token[1] = (token[1] + 1) % 23
    token[5] = (token[5] + 8) % 23
    with torch.no_grad():
        logprob, greedy = token_logprobs(head, hidden, row, token)
    torch.testing.assert_close(logprob, expected[row, token].detach())
    assert greedy.tolist() == [True, False, True, True, True, False, True, True]


def test_bfloat16_logits_that_tie_do_not_tie_here() -> None:
    head = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[256.0, 0.0], [256.0, 0.5]]))
        hidden = torch.ones(1, 2, dtype=torch.bfloat16)
        assert head(hidden)[0, 0] == head(hidden)[0, 1]
        logprob, greedy = token_logprobs(head, hidden, torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert logprob[1] - logprob[0] == pytest.approx(0.5, abs=1e-4)
    assert greedy.tolist() == [False, True]
