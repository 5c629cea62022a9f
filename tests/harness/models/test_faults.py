"""What goes wrong with files: full disks, cut, changed and contradicting weights, kills. No half folders."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from harness.errors import UserError
from harness.models import LoadedModel, load_model
from harness.models.checkpoint import INDEX, weight_files
from harness.models.loading import read_model
from harness.models.saving import save_model
from harness.records import ModelRef

MakeTiny = Callable[..., LoadedModel]

LARGE = """
import sys, torch
from hashlib import sha256
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from harness.models.saving import save_model
config = LlamaConfig(vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3,
                     num_attention_heads=8, num_key_value_heads=2)
model = LlamaForCausalLM(config)
def checksum(model): return sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
"""
"""A script that holds a model of 260 MB."""


@pytest.fixture
def saved(make_tiny: MakeTiny, tmp_path: Path) -> Path:
    """A folder as this package writes it."""
    save_model(make_tiny("grouped-query", torch.float32).model, None, tmp_path / "model", "card")
    return tmp_path / "model"


@pytest.fixture
def sharded(make_tiny: MakeTiny, tmp_path: Path) -> Path:
    """The same in several shards, as transformers writes big models."""
    make_tiny("grouped-query", torch.float32).model.save_pretrained(tmp_path / "shards", max_shard_size="80KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    return tmp_path / "shards"


def checksum(model: torch.nn.Module) -> str:
    """Of the bytes: sums depend on how many threads add them up."""
    return sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def load(folder: Path) -> object:
    return load_model(ModelRef(name=str(folder)))


def change_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize("left", [0.5, 0.999])
def test_a_truncated_shard_is_named(sharded: Path, left: float) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(UserError, match=rf"{shard.name} is cut off or damaged \(.*\); download or write it again"):
        read_model(sharded, torch.float32)


def test_an_empty_shard_and_a_broken_index_are_told(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(b"")
    with pytest.raises(UserError, match="cut off or damaged"):
        load(sharded)
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": [')
    with pytest.raises(UserError, match="is not an index of weight files"):
        load(sharded)


def test_an_index_left_from_an_earlier_save_does_not_count(sharded: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(sharded)
    for shard in sharded.glob("model-*.safetensors"):
        shard.unlink()
    whole.save_pretrained(sharded)
    (sharded / INDEX).write_text('{"weight_map": {"lm_head.weight": "model-00001-of-00009.safetensors"}}')
    assert weight_files(sharded) == [sharded / "model.safetensors"]


def test_code_of_a_checkpoint_is_not_run_whoever_answers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(saved, model_type="unheard-of", auto_map={"AutoConfig": "conf.Conf"})
    (saved / "conf.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="could not be loaded as a language model"):
        load(saved)


def test_a_changed_weight_file_has_the_wrong_hash(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors has SHA-256 \w{12}..., not \w{12}... as noted: it is dam"):
        load(saved)
    (saved / "SHA256SUMS").unlink()
    read_model(saved, torch.float32)


def test_a_blob_of_the_hub_cache_that_is_not_what_its_name_says_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / "SHA256SUMS").unlink()
    blob = tmp_path / ("ab" * 32)
    (saved / "model.safetensors").rename(blob)
    (saved / "model.safetensors").symlink_to(blob)
    with pytest.raises(UserError, match=r"has SHA-256 \w{12}..., not abababababab... as noted"):
        load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 96}, r"0\.mlp\.gate_proj\.weight is \[80, 48\] where config\.json says \[96, 48\]"),
        ({"num_key_value_heads": 3}, r"k_proj\.weight is \[16, 48\] where config\.json says \[24, 48\]"),
        ({"num_hidden_layers": 4}, r"there is no model\.layers\.3\.\S+, which config\.json asks for"),
        ({"num_hidden_layers": 2}, r"model\.layers\.2\.\S+ is stored, which config\.json knows nothing of"),
        ({"tie_word_embeddings": True}, "ties the embeddings, but a head that differs is stored"),
        ({"attention_bias": True}, r"there is no model\.layers\.0\.self_attn\.\w_proj\.bias"),
        ({"vocab_size": 100}, r"embed_tokens\.weight is \[96, 48\] where config\.json says \[100, 48\]"),
    ],
)  # fmt: skip
def test_a_configuration_that_contradicts_the_weights_is_refused(
    saved: Path, change: dict[str, object], message: str
) -> None:
    change_config(saved, **change)
    with pytest.raises(UserError, match=message) as caught:
        load(saved)
    assert "contradict its config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layer_widths_that_contradict_the_weights_are_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    from harness.models import remove_units

    loaded = make_tiny("grouped-query", torch.float32)
    pruned = remove_units(loaded.model, loaded.structure, {"layers.1.mlp": torch.arange(40)})
    save_model(pruned, None, tmp_path / "model", "card")
    change_config(tmp_path / "model", per_layer_config={"1": {"intermediate_size": 41}})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.gate_proj\.weight is \[40, 48\] where config.json says \[41"):
        load(tmp_path / "model")
    change_config(tmp_path / "model", per_layer_config={"1": {"num_attention_heads": 3}})
    with pytest.raises(UserError, match="layer 1 has 3 query heads for 2 kv heads"):
        load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load(tmp_path / "model")


def test_out_of_disk_while_writing_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    code = LARGE + (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "from harness.errors import UserError\n"
        "try: save_model(model, None, Path(sys.argv[1]), 'card')\n"
        "except UserError as error: print(error)\n"
    )
    out = tmp_path / "models" / "pruned"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    assert "File too large; free some space" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert list(out.parent.iterdir()) == []


def test_a_save_killed_at_any_moment_leaves_no_folder_that_loads_in_part(tmp_path: Path) -> None:
    code = LARGE + "print(checksum(model), flush=True)\nsave_model(model, None, Path(sys.argv[1]), 'card')\n"
    out = tmp_path / "pruned"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    whole = process.stdout.readline().strip()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".pruned-*/pruned/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    left = list(tmp_path.glob(".pruned-*/pruned"))
    assert len(left) == 1
    try:
        loaded = AutoModelForCausalLM.from_pretrained(left[0])
    except (OSError, SafetensorError):
        pass
    else:  # killed between the last weight and the rename
        assert checksum(loaded) == whole
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    save_model(LlamaForCausalLM(config), None, out, "card")  # what is left is in nobody's way
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 8
