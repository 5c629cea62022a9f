"""A model spread over two processes while it trains: the numbers of one, half of the memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.models import LoadedModel


@pytest.mark.parametrize("shape", ["tied", "shared-layers"])
def test_two_processes_hold_half_each_and_train_prune_and_resume_as_one(
    shape: str, make_tiny: Callable[..., LoadedModel], run_script: Callable[..., None], tmp_path: Path
) -> None:
    make_tiny(shape).model.save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("sharded_course.py")
    for name, processes in (("one", 1), ("two", 2)):
        run_script(script, tmp_path / "model", tmp_path / name, processes=processes)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-9)
    assert two["parameters_here"] == pytest.approx(one["parameters_here"] / 2, rel=0.1)
    expected, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-9)
