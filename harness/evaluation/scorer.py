"""The scorer that lm-eval is handed: stock HFLM, its log-likelihoods taken from a token forest instead of from rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.errors import UserError
from harness.evaluation.attention import AttentionNotCoveredError
from harness.evaluation.forest import Ints, grow
from harness.evaluation.forest_pass import NonFiniteOutputError, Progress, score_tails
from harness.evaluation.head import plain_head
from harness.evaluation.request_cache import cache_file, read_requests, write_requests

Request = tuple[tuple[str, str], list[int], list[int]]
"""What lm-eval scores: (context, continuation) as text, then the tokens of each."""
Score = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding gives the continuation."""

_ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest sequence of the batch."""


class TrieScorer(HFLM):
    """HFLM whose log-likelihoods run shared beginnings once; equal to HFLM's own up to float error.

    What it cannot do this way (see ``why_not_fast``) lm-eval's own code does; ``notes`` says so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int,
        cache: Path | None = None,
        progress: Progress | None = None,
        max_length: int | None = None,
    ) -> None:
        with _weights_left_alone(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length)
        self._batch_tokens = batch_tokens
        self._cache = cache
        self._progress = progress
        self.num_truncated = 0
        """Requests longer than the model takes, whose context lost its beginning."""
        self.num_empty = 0
        """Requests with nothing to score; their log-likelihood is 0."""
        self.num_slow = 0
        """Requests that lm-eval's own code scored."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the scores must know."""
        found = []
        if self.num_truncated:
            found.append(
                f"{self.num_truncated} contexts were longer than the {self.max_length} tokens the model takes "
                "and lost their beginning, as lm-eval does it"
            )
        if self.num_empty:
            found.append(f"{self.num_empty} continuations were empty and count as certain (log-likelihood 0)")
        if self.num_slow:
            why = self.why_not_fast or f"longer than the attention window of {self._window}"
            found.append(f"{self.num_slow} requests were scored by lm-eval's own runner: {why}")
        return tuple(found)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Scores of (context, continuation) pairs."""
        return self._loglikelihood_tokens(self.encoded([request.args for request in requests]))

    def encoded(self, texts: Sequence[tuple[str, str]]) -> list[Request]:
        """The tokens of texts: from the cache, if another model of this tokenizer was given the same texts."""
        options = {"prefix_token_id": self.prefix_token_id, "add_bos_token": self.add_bos_token}
        path = cache_file(self._cache, self.tokenizer, options, texts) if self._cache else None
        known = read_requests(path, len(texts)) if path else None
        if known is not None:
            return [(text, *tokens) for text, tokens in zip(texts, known, strict=True)]
        requests = self._encode(texts)
        if path:
            write_requests(path, [(context, continuation) for _, context, continuation in requests])
        return requests

    def extent(self, texts: Sequence[tuple[str, str]]) -> tuple[int, int]:
        """Tokens that scoring some texts runs, what they share once, and positions at which the head is applied."""
        requests = [(context, continuation) for _, context, continuation in self.encoded(texts) if continuation]
        if not requests:
            return 0, 0
        inputs = [self._input(context, continuation) for context, continuation in requests]
        forest = grow(inputs, [len(continuation) for _, continuation in requests])
        return forest.num_nodes, len(np.unique(np.concatenate(forest.nodes_of)))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in lm-eval's windows, without its progress bar."""
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return found

    def _encode(self, texts: Sequence[tuple[str, str]]) -> list[Request]:
        """As TemplateLM encodes them, but every distinct text once and all of them in one call."""
        parts = []
        for context, continuation in texts:
            kept = context.rstrip()
            # Trailing blanks belong to the continuation; a context of nothing but blanks goes over whole.
            parts.append((kept, context[len(kept) :] + continuation) if context else ("", continuation))
        wholes = [before + after for before, after in parts]
        ids = self._encode_all({*(before for before, _ in parts if before), *wholes})
        requests = []
        for text, (before, after), whole in zip(texts, parts, wholes, strict=True):
            if before:
                requests.append((text, ids[before], ids[whole][len(ids[before]) :]))
            else:
                requests.append((text, *self._after_prefix_token(after)))
        return requests

    def _encode_all(self, texts: set[str]) -> dict[str, list[int]]:
        bos = self.tokenizer.decode(self.prefix_token_id)
        encoded: dict[str, list[int]] = {}
        for starts_with_bos in (False, True):
            some = [text for text in texts if has_bos_prefix(text, bos) == starts_with_bos]
            if some:
                # A text that brings its own BOS gets no second one.
                options = {"add_special_tokens": False} if starts_with_bos else {}
                encoded.update(zip(some, self.tokenizer(some, **options)["input_ids"], strict=True))
        return encoded

    def _after_prefix_token(self, continuation: str) -> tuple[list[int], list[int]]:
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if ids and ids[0] == self.prefix_token_id:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        scores: list[Score] = [(0.0, True)] * len(requests)
        scored = [i for i, (_, _, continuation) in enumerate(requests) if continuation]
        self.num_empty += len(requests) - len(scored)
        fast = [] if self.why_not_fast else [i for i in scored if self._fits_window(requests[i])]
        slow = sorted({*scored} - {*fast})
        if fast:
            for i, score in zip(fast, self._score_fast([requests[i] for i in fast]), strict=True):
                scores[i] = score
        if slow:
            self.num_slow += len(slow)
            for i, score in zip(slow, self._score_slow([requests[i] for i in slow]), strict=True):
                scores[i] = score
        return scores

    def _score_fast(self, requests: Sequence[Request]) -> list[Score]:
        inputs = [self._input(context, continuation) for _, context, continuation in requests]
        tails = [np.array(continuation, np.int64) for *_, continuation in requests]
        head = self.model.get_output_embeddings()
        found = score_tails(self.model, head, inputs, tails, self._batch_tokens, self._progress)
        return list(zip(found.loglikelihood.tolist(), found.greedy.tolist(), strict=True))

    def _score_slow(self, requests: list[Request]) -> list[Score]:
        for _, context, continuation in requests:
            self._input(context, continuation)  # counts what is truncated
        found: list[Score] = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        if not np.isfinite([loglikelihood for loglikelihood, _ in found]).all():
            raise NonFiniteOutputError("the model's logits are not finite (NaN or infinity): it cannot be scored")
        return found

    def _input(self, context: list[int], continuation: list[int]) -> Ints:
        """What the model reads: all but the last token, its beginning cut off where it is too long."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the {self.max_length} the model takes"
            )
        tokens = context + continuation
        self.num_truncated += len(tokens) > self.max_length + 1
        return np.array(tokens[-(self.max_length + 1) :][:-1], np.int64)

    @cached_property
    def _window(self) -> int | None:
        """Tokens that sliding-window layers attend to; None where every layer attends to all."""
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        layer_types = getattr(config, "layer_types", None)
        slides = "sliding_attention" in layer_types if layer_types else getattr(config, "use_sliding_window", True)
        return int(window) if window and slides else None

    def _fits_window(self, request: Request) -> bool:
        return self._window is None or len(request[1]) + len(request[2]) <= self._window

    @cached_property
    def why_not_fast(self) -> str | None:
        """Why this model's scores come from lm-eval's own code; None where they come from the forest."""
        head = plain_head(self.model)
        if isinstance(head, str):
            return head
        rope = (getattr(self.model.config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope in _ROPE_BY_LENGTH:
            return f"its rotary embedding ({rope}) depends on the longest sequence of a batch"
        try:
            return None if self._forest_equals_rows(head) else "its attention is not plain causal attention"
        except AttentionNotCoveredError as error:
            return str(error)

    def _forest_equals_rows(self, head: nn.Linear) -> bool:
        """Whether two short sequences score the same through a forest in small chunks and as rows of their own."""
        ids = np.arange(1, 48, dtype=np.int64) % head.out_features
        sequences = [ids[:30], np.concatenate([ids[:17], ids[31:40]])]
        tails = [ids[:4], ids[4:8]]
        by_row = []
        with torch.no_grad():
            for sequence, tail in zip(sequences, tails, strict=True):
                token = torch.from_numpy(sequence).unsqueeze(0).to(self.device)
                logits = self.model(input_ids=token, use_cache=False).logits[0, -len(tail) :].float()
                chosen = logits.log_softmax(-1).gather(1, torch.from_numpy(tail).to(logits.device).unsqueeze(1))
                by_row.append(float(chosen.sum()))
        if not np.isfinite(by_row).all():
            return True  # a broken model: scoring it finds the module and raises
        by_forest = score_tails(self.model, head, sequences, tails, batch_tokens=17).loglikelihood
        tolerance = 1e-3 if head.weight.dtype.itemsize >= 4 else 2e-2
        return bool(np.allclose(by_row, by_forest, rtol=tolerance, atol=4 * tolerance))


@contextmanager
def _weights_left_alone(model: PreTrainedModel) -> Iterator[None]:
    """Within it ``tie_weights`` does nothing.

    HFLM calls it on every model it is given, and it ties whatever the config calls tied: a head that a method untied
    without saying so in the config would be overwritten by the embedding.
    """

    def leave(*_args: Any, **_kwargs: Any) -> None:
        return None

    model.tie_weights = leave
    try:
        yield
    finally:
        del model.tie_weights
