"""What scoring will cost, before it starts: the tokens a model has to run, and how fast it runs them here.

`python -m harness.evaluation.cost request.json` answers a CostRequest on standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from harness.cost import CostRequest, ScoringCost
from harness.cpu import fast_cpu
from harness.errors import UserError
from harness.evaluation.quiet import quiet, templates_compiled_once
from harness.evaluation.scorer import TrieScorer
from harness.evaluation.tasks import build_tasks
from harness.models.assemble import without_weights
from harness.models.loading import load_tokenizer, main_device, require_device
from harness.models.prospect import model_config
from harness.models.source import checkpoint_folder
from harness.structure import count_parameters
from harness.timing import fastest

_BATCH, _LENGTH = 4, 128
"""Tokens of the trial run."""
_ROWS = 256


def scoring_cost(request: CostRequest) -> ScoringCost:
    """What scoring a model will cost; its weights are not read.

    Raises:
        UserError: a model, tasks or data that cannot be reached.
    """
    require_device(main_device(request.device))
    folder = checkpoint_folder(request.model)
    spec, device = request.evaluation, torch.device(main_device(request.device))
    with quiet():
        model = without_weights(model_config(folder)).to(getattr(torch, request.dtype))
        tokenizer = load_tokenizer(folder)
    task_set = build_tasks(spec)
    task_set.reseed()
    texts: list[tuple[str, str]] = []
    documents: dict[str, int] = {}
    with quiet(), templates_compiled_once():
        for leaf, task in task_set.leaves.items():
            task.build_all_requests(samples=task_set.samples.get(leaf))
            texts += [instance.args for instance in task.instances if len(instance.args) == 2]
            name = task_set.group_of[leaf]
            documents[name] = documents.get(name, 0) + len({instance.doc_id for instance in task.instances})
        scorer = TrieScorer(model, tokenizer, batch_tokens=request.batch_tokens, cache=request.cache)
        num_tokens, num_scored = scorer.extent(texts)
    return ScoringCost(
        documents=documents,
        num_tokens=num_tokens,
        num_scored=num_scored,
        heldout_tokens=spec.heldout_tokens,
        params=count_parameters(model.named_parameters()),
        seconds_per_token=_layers_seconds(model, device),
        seconds_per_row=_head_seconds(model, device),
    )


@torch.no_grad()
@fast_cpu()
def _layers_seconds(model: PreTrainedModel, device: torch.device) -> float:
    """Seconds per token of all layers: of the middle one, with weights of zeros, as the values do not matter."""
    base: Any = model.base_model
    num_layers = len(base.layers)
    base.layers = nn.ModuleList([base.layers[len(base.layers) // 2]])
    base.embed_tokens = nn.Identity()
    base.to_empty(device=device)
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.zero_()
    hidden_BTC = torch.zeros(_BATCH, _LENGTH, model.config.hidden_size, dtype=model.dtype, device=device)
    seconds = fastest(_awaited(lambda: base(inputs_embeds=hidden_BTC, use_cache=False), device))
    return num_layers * seconds / (_BATCH * _LENGTH)


@torch.no_grad()
@fast_cpu()
def _head_seconds(model: PreTrainedModel, device: torch.device) -> float:
    """Seconds per position of the head, in float32 as it is applied."""
    vocabulary: int = model.config.vocab_size
    size = min(4096, vocabulary)
    weight = torch.zeros(size, model.config.hidden_size, device=device)
    hidden_RC = torch.zeros(_ROWS, model.config.hidden_size, device=device)

    def run() -> Tensor:
        return torch.logsumexp(functional.linear(hidden_RC, weight), dim=-1)

    return fastest(_awaited(run, device)) / _ROWS * vocabulary / size


def _awaited(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same, waiting for a GPU to finish."""

    def awaited() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return awaited


def main() -> None:
    """Answer the request in the file named on the command line; what the user must mend goes to standard error."""
    request = CostRequest.model_validate_json(Path(sys.argv[1]).read_text())
    if request.num_threads:
        torch.set_num_threads(request.num_threads)
    try:
        print(scoring_cost(request).model_dump_json())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
