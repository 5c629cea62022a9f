"""Programs that know nothing of this package load pruned models, whatever they import first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.models import LoadedModel, remove_units
from harness.models.saving import save_model

# Defining LlamaConfig, transformers imports its Auto classes: then there is nothing yet that could be registered.
FIRST = ["from transformers import LlamaConfig", "from transformers import AutoModelForCausalLM"]


@pytest.mark.parametrize("first", FIRST)
def test_a_pruned_folder_loads(first: str, make_tiny: Callable[..., LoadedModel], tmp_path: Path) -> None:
    loaded = make_tiny("grouped-query")
    pruned = remove_units(loaded.model, loaded.structure, {"layers.0.mlp": torch.arange(7)})
    save_model(pruned, None, tmp_path / "pruned", "card")
    # The hook is what the installed start-up line imports.
    program = f"""
import harness.transformers_hook
{first}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "pruned")!r})
print(type(model).__name__, model.model.layers[0].mlp.down_proj.in_features)
"""
    environment = {**os.environ, "PYTHONWARNINGS": "error:pruned models"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PrunedLlamaForCausalLM", "7"]
