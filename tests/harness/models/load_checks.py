"""What must work on a saved model however it was loaded. Needs torch, transformers and peft; none of this project.

Run as a script, ``load_checks.py {plain,remote} [--only CHECK,...] FOLDER...``, it loads every folder in that way and
prints a line of JSON for each: which checks failed, its parameter count, its class. Beside the model a folder has
``expected.pt`` with token ids and logits.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Load = Callable[..., Any]


def loader(folder: Path, way: str) -> Load:
    """A function that loads the folder: ``plain``, or ``remote`` for trust_remote_code=True."""

    def load(**options: Any) -> Any:
        trusted = {"trust_remote_code": True} if way == "remote" else {}
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **trusted, **options)

    return load


def logits_are_equal(load: Load, expected: dict[str, Any]) -> None:
    model, info = load(output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(model(expected["tokens"]).logits, expected["logits"])


def count_and_tiedness_are_kept(load: Load, expected: dict[str, Any]) -> None:
    model = load()
    assert sum(p.numel() for p in model.parameters()) == expected["num_params"]
    model.tie_weights()  # lm-eval does
    assert sum(p.numel() for p in model.parameters()) == expected["num_params"]
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == expected["tied"] == model.config.tie_word_embeddings


def generation_with_a_cache_equals_generation_without(load: Load, expected: dict[str, Any]) -> None:
    model, prompt = load(), expected["tokens"][:2, :5]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = prompt
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, **options), ids)
    assert torch.equal(model.generate(prompt, use_cache=False, **options), ids)


def embeddings_can_be_resized(load: Load, expected: dict[str, Any]) -> None:
    model = load()
    size = expected["logits"].shape[-1]
    model.resize_token_embeddings(size + 8, mean_resizing=False)
    logits = model(expected["tokens"]).logits
    assert logits.shape[-1] == size + 8 == model.config.vocab_size
    torch.testing.assert_close(logits[..., :size], expected["logits"])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == expected["tied"]
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        resized = type(model).from_pretrained(again, local_files_only=True)
    assert torch.equal(resized(expected["tokens"]).logits, logits)


def training_lowers_the_loss(load: Load, expected: dict[str, Any]) -> None:
    model, tokens = load().train(), expected["tokens"]
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.numel())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0], losses


def lora_trains_and_merges(load: Load, expected: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokens = load(), expected["tokens"]
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    torch.testing.assert_close(adapted(tokens).logits, expected["logits"])
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    before = float(adapted(tokens, labels=tokens).loss)
    for _ in range(3):
        adapted(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapted(tokens, labels=tokens)
    assert float(after.loss) < before
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, after.logits, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in merged.parameters()) == expected["num_params"]


def half_precision_is_near(load: Load, expected: dict[str, Any]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = load(dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        logits = model(expected["tokens"]).logits.float()
        error = (logits - expected["logits"]).norm() / expected["logits"].norm()
        assert error < 0.05, float(error)


def device_map_places_layers_and_disk(load: Load, expected: dict[str, Any]) -> None:
    num_layers = len(load().model.layers)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(num_layers)}
    with tempfile.TemporaryDirectory() as offload:
        for device_map in ("auto", {"": "cpu"}, places):
            model = load(device_map=device_map, offload_folder=offload)
            assert torch.equal(model(expected["tokens"]).logits, expected["logits"]), device_map
        # Nothing but whole layers may be placed: a residual sum needs both of its terms in one place.
        layer = type(model.model.layers[0]).__name__
        assert layer in model._no_split_modules, (layer, model._no_split_modules)


def hidden_states_can_be_asked_for(load: Load, expected: dict[str, Any]) -> None:
    model = load()
    out = model(expected["tokens"], output_hidden_states=True)
    assert len(out.hidden_states) == len(model.model.layers) + 1
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(expected["tokens"]))


def compiled_gives_the_same(load: Load, expected: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = torch.compile(load(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["tokens"], use_cache=False).logits, expected["logits"])


CHECKS: tuple[Callable[[Load, dict[str, Any]], None], ...] = (
    logits_are_equal,
    count_and_tiedness_are_kept,
    generation_with_a_cache_equals_generation_without,
    embeddings_can_be_resized,
    training_lowers_the_loss,
    lora_trains_and_merges,
    half_precision_is_near,
    device_map_places_layers_and_disk,
    hidden_states_can_be_asked_for,
    compiled_gives_the_same,
)


def main() -> None:
    """Check every folder that the command line names, in the way that it names first."""
    way, names = sys.argv[1], sys.argv[2:]
    checks = CHECKS
    if names[0] == "--only":
        checks = tuple(check for check in CHECKS if check.__name__ in names[1].split(","))
        names = names[2:]
    for folder in map(Path, names):
        expected = torch.load(folder / "expected.pt")
        load = loader(folder, way)
        failed = {}
        for check in checks:
            try:
                check(load, copy.copy(expected))
            except Exception as error:
                failed[check.__name__] = f"{type(error).__name__}: {error}"[:2000]
        model = load()
        line = {"folder": folder.name, "failed": failed, "num_params": sum(p.numel() for p in model.parameters())}
        line |= {"module": type(model).__module__, "class": type(model).__name__}
        line["ours"] = any(name == "harness" or name.startswith("harness.") for name in sys.modules)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
