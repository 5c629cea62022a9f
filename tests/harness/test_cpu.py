"""Float32 on the CPU: another library, the same numbers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from harness import cpu
from harness.cpu import fast_cpu, fast_matmul
from harness.models import LoadedModel


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN is faster."""
    monkeypatch.setattr(cpu, "matmul_library", lambda: "onednn")


@contextmanager
def products() -> Iterator[list[str]]:
    """Names of the products that ran within it."""
    ran: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.name().split("::")[1].startswith(("mm", "addmm", "_linear_pointwise")):
                ran.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        yield ran


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_are_those_of_pytorch_to_float_tolerance(bias: bool) -> None:
    layer = torch.nn.Linear(160, 320, bias=bias)
    inputs = torch.randn(2, 100, 160, requires_grad=True)

    def run() -> list[torch.Tensor]:
        layer.zero_grad()
        inputs.grad = None
        out = layer(inputs)
        out.square().mean().backward()
        assert inputs.grad is not None
        return [out.detach(), inputs.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    expected = run()
    with products() as ran, fast_matmul():
        found = run()
    assert ran == ["mkldnn::_linear_pointwise"] * 3  # forward, gradient of the input, gradient of the weight
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 256), (torch.bfloat16, 256), (torch.float32, 16)], ids=str)
def test_other_types_and_small_products_are_left_alone(dtype: torch.dtype, size: int) -> None:
    left = torch.randn(size, size, dtype=dtype)
    with products() as ran, fast_matmul():
        found = left @ left
    assert ran == ["aten::mm"]
    assert torch.equal(found, left @ left)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("rows", [0, 5])
def test_empty_and_strided_products(rows: int) -> None:
    left, right = torch.randn(2048, 2 * 64)[:, ::2][: rows * 400], torch.randn(96, 64)
    with fast_matmul():
        found = functional.linear(left, right)
    torch.testing.assert_close(found, functional.linear(left, right), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("onednn")
def test_products_are_added_in_place() -> None:
    total, left, right = torch.randn(200, 300), torch.randn(200, 160), torch.randn(160, 300)
    expected = total + left @ right
    with products() as ran, fast_matmul():
        returned = total.addmm_(left, right)
    assert ran == ["mkldnn::_linear_pointwise"]
    assert returned is total
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("onednn")
def test_entered_twice_it_acts_once_and_is_left_when_the_outer_ends() -> None:
    with fast_cpu():
        with fast_cpu():
            pass
        assert cpu._OneDnnMatmul.is_active()
    assert not cpu._OneDnnMatmul.is_active()


def test_where_pytorch_is_as_fast_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "matmul_library", lambda: "torch")
    with products() as ran, fast_matmul():
        torch.randn(256, 256) @ torch.randn(256, 256)
    assert ran == ["aten::mm"]


def test_the_library_is_one_of_two() -> None:
    assert cpu.matmul_library() in ("torch", "onednn")


@pytest.mark.usefixtures("onednn")
def test_logits_of_the_embedded_model_are_as_near_to_float64_as_those_of_pytorch(smollm2: LoadedModel) -> None:
    ids = smollm2.tokenizer("She cut the bread, then the cheese. " * 8, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        exact = copy.deepcopy(smollm2.model).double()(ids).logits
        stock = smollm2.model(ids).logits
        with fast_cpu():
            ours = smollm2.model(ids).logits
    assert (ours - exact).abs().max() <= 3 * (stock - exact).abs().max()


@pytest.mark.skipif(cpu._glibc() is None, reason="the C library is not glibc")
def test_what_is_free_beyond_a_gigabyte_is_given_back() -> None:
    with fast_cpu():
        blocks = [torch.ones(1000, 1000 + i) for i in range(400)]  # too large for each other's places
        held = cpu._private_bytes()
        cpu.return_surplus()
        assert cpu._private_bytes() > held - 2**26  # all of it is in use
        del blocks
        cpu.return_surplus()
        assert cpu._private_bytes() < held - 2**30


@pytest.mark.skipif(cpu._glibc() is None, reason="the C library is not glibc")
def test_a_hole_between_blocks_in_use_is_given_back_when_it_is_made() -> None:
    # Each in a process of its own: what another test freed lies in the heap and would be filled first.
    assert _given_back_of_holes("fast_cpu") < 2**26
    assert _given_back_of_holes("lean_cpu") > 0.9 * 200 * 4_000_000


def _given_back_of_holes(context: str) -> int:
    """Bytes that the system has back after 200 of 400 blocks of 4 MB, every other one, are freed."""
    code = f"""
import torch
from harness import cpu
with cpu.{context}():
    blocks = [torch.ones(1000, 1000 + i) for i in range(400)]
    held = cpu._private_bytes()
    del blocks[::2]
    print(held - cpu._private_bytes())
"""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
