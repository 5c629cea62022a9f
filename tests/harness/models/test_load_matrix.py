"""Every kind of saved model, loaded with this package installed and not imported, and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from baselines.flap import FLAP
from harness.budget import ParameterTarget
from harness.models import remove_units
from harness.models.saving import save_model
from harness.registry import build_method

ROOT = Path(__file__).parents[3]
CHECKS = Path(__file__).parent / "load_checks.py"
UNEVEN = {"layers.0.attention": torch.tensor([1]), "layers.1.mlp": torch.arange(5, 40)}
NOTHING = torch.tensor([], dtype=torch.int64)


def cut(tiny_model: Any, shape: str, plan: dict[str, torch.Tensor]) -> Any:
    loaded = tiny_model(shape)
    return remove_units(loaded.model, loaded.structure, plan)


def pruned(tiny_model: Any, shape: str, method: str, **params: Any) -> Any:
    loaded = tiny_model(shape)
    tokens = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(7))
    target = ParameterTarget(0.15, "total", loaded.params)
    return next(build_method(method, params).prune(loaded, tokens, [target], 0)).model


KINDS = {
    "uniform": lambda m: cut(m, "tied", {f"layers.{i}.mlp": torch.arange(i, i + 32) for i in range(3)}),
    "widths": lambda m: cut(m, "grouped-query", UNEVEN),
    "widths-tied": lambda m: cut(m, "tied", UNEVEN),
    "widths-mistral": lambda m: cut(m, "mistral", UNEVEN),
    "widths-qwen2": lambda m: cut(m, "qwen2", UNEVEN),
    "widths-qwen3": lambda m: cut(m, "qwen3", UNEVEN),
    "empty-layers": lambda m: cut(m, "biased", {"layers.0.attention": NOTHING, "layers.2.mlp": NOTHING}),
    "shared-layers": lambda m: cut(m, "shared-layers", UNEVEN),
    "flap": lambda m: pruned(m, "tied", FLAP.name),
    "slicegpt": lambda m: pruned(m, "tied", "slicegpt"),
    "slicegpt-whole-head": lambda m: pruned(m, "grouped-query", "slicegpt", slice_head=False),
}
STOCK = {"uniform"}
"""Kinds that a stock class expresses."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_tiny: Any) -> list[Path]:
    """One saved model of each kind, in float32, with the token ids and logits to expect of it."""
    out = tmp_path_factory.mktemp("saved")
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    for kind, make in KINDS.items():
        model = make(lambda shape: make_tiny(shape, torch.float32))
        save_model(model, None, out / kind, "card")
        expected = {"tokens": tokens, "logits": model(tokens).logits.detach()}
        expected |= {"num_params": sum(p.numel() for p in model.parameters())}
        expected |= {"tied": model.config.tie_word_embeddings}
        torch.save(expected, out / kind / "expected.pt")
    return [out / kind for kind in KINDS]


def environment(folder: Path, *, ours: bool) -> Path:
    """Python of a virtual environment with our dependencies, and our wheel or nothing of ours."""
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A path line: packages found there, but not its .pth files, so not our own editable installation.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if ours:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--target", str(site), str(ROOT)], check=True)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    clean |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(python.parent / "modules")}
    done = subprocess.run(
        [python, *arguments], cwd=python.parent, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def with_us(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("with"), ours=True)


@pytest.fixture(scope="module")
def without_us(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("without"), ours=False)


def checked(python: Path, way: str, folders: list[Path], *checks: str) -> dict[str, dict[str, Any]]:
    """Folder name -> what ``load_checks.py`` says of it."""
    only = ["--only", ",".join(checks)] if checks else []
    lines = run(python, "-W", "ignore", str(CHECKS), way, *only, *map(str, folders)).splitlines()
    found = {line["folder"]: line for line in map(json.loads, lines)}
    assert list(found) == [folder.name for folder in folders]
    assert {name: line["failed"] for name, line in found.items() if line["failed"]} == {}
    return found


def test_with_the_package_installed_a_plain_from_pretrained_is_enough(with_us: Path, folders: list[Path]) -> None:
    found = checked(with_us, "plain", folders)
    for name, line in found.items():
        assert line["module"] == ("transformers.models.llama.modeling_llama" if name in STOCK else
                                  "harness.models.modeling_pruned")  # fmt: skip


def test_without_the_package_the_folder_brings_its_code(without_us: Path, folders: list[Path]) -> None:
    basics = ("logits_are_equal", "count_and_tiedness_are_kept", "generation_with_a_cache_equals_generation_without")
    found = checked(without_us, "remote", folders, *basics)
    for name, line in found.items():
        assert not line["ours"]
        assert line["module"].startswith("transformers.models.llama" if name in STOCK else "transformers_modules.")


@pytest.mark.slow
def test_without_the_package_all_of_it_works_as_with_it(without_us: Path, folders: list[Path]) -> None:
    found = checked(without_us, "remote", folders)
    assert found.keys() == {folder.name for folder in folders}
    assert not any(line["ours"] for line in found.values())


def test_without_the_package_and_without_trust_a_stock_model_loads_and_others_ask(
    without_us: Path, folders: list[Path]
) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    try: print(type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)).__name__)\n"
        "    except ValueError as error: print('trust_remote_code' in str(error))\n"
    )
    chosen = [str(folder) for folder in folders if folder.name in ("uniform", "widths")]
    assert run(without_us, "-W", "ignore", "-c", code, *chosen).split() == ["LlamaForCausalLM", "True"]


def test_python_starts_without_loading_anything_for_the_hook(with_us: Path) -> None:
    code = "import sys; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert run(with_us, "-c", code).strip() == "[]"


def test_saved_folders_hold_safetensors_and_the_layers_schema_of_transformers(folders: list[Path]) -> None:
    for folder in folders:
        files = {path.name for path in folder.iterdir()} - {"expected.pt"}
        code = set() if folder.name in STOCK else {"modeling_pruned.py"}
        assert files == {"config.json", "generation_config.json", "model.safetensors", "README.md", "SHA256SUMS"} | code
        config = json.loads((folder / "config.json").read_text())
        if folder.name in STOCK:
            assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
            assert "auto_map" not in config
        elif folder.name.startswith("widths"):
            expected = {"0": {"num_attention_heads": 3, "num_key_value_heads": 1}, "1": {"intermediate_size": 35}}
            if folder.name == "widths-tied":
                expected["0"] = {"num_attention_heads": 2, "num_key_value_heads": 1}
            assert config["per_layer_config"] == expected


def test_a_model_in_a_plain_module_tree_has_only_linear_maps_for_adapters(folders: list[Path]) -> None:
    from transformers import AutoModelForCausalLM

    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        layer = model.model.layers[-1]
        names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        assert all(type(layer.get_submodule(name)) is nn.Linear for name in names)
