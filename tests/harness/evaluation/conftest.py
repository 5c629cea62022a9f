"""A tokenizer for the tiny models, and stock HFLM to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from harness.evaluation.quiet import quiet
from harness.evaluation.scorer import Request, Score


@pytest.fixture(scope="session")
def letters() -> PreTrainedTokenizerFast:
    """One token per character, 96 in all: id 0 is the end of a text, the rest printable ASCII."""
    vocabulary = {"<eos>": 0, **{chr(32 + i): i + 1 for i in range(95)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def stock(letters: PreTrainedTokenizerFast) -> Callable[[PreTrainedModel, Sequence[Request]], list[Score]]:
    """Scores by lm-eval's own code, one request at a time."""

    def score(model: PreTrainedModel, requests: Sequence[Request]) -> list[Score]:
        with quiet():
            lm = HFLM(pretrained=model, tokenizer=letters, batch_size=1, logits_cache=False)
            return lm._loglikelihood_tokens(list(requests), disable_tqdm=True)

    return score
