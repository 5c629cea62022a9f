"""What makes float32 fast on a CPU beyond PyTorch's defaults: its other matrix library, and memory that stays warm.

- PyTorch's builds for x86 hand float32 products to MKL, which keeps to AVX2 on processors that are not Intel's even
  where they have AVX-512; oneDNN, which the builds contain too, asks the processor. Both are float32 throughout and add
  up in another order, so results agree to float tolerance. Which of them is faster is measured once per process.
- glibc gives freed memory back to the system, which hands it out again page by page, each filled with zeros: a forward
  pass on thousands of tokens spends a third of its time so. Within `fast_cpu` a gigabyte of it is kept.
- A model larger than memory that is cut to ever other widths asks for blocks of ever other sizes, and the holes they
  leave between them add up to its own size again. Within `lean_cpu` large blocks go back to the system at once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from harness.timing import fastest

# Shapes: [M, K] times [K, N].

MatmulLibrary = Literal["torch", "onednn"]

_LEAST_PRODUCTS = 2**22
"""M * K * N from which on the detour pays."""
_LEAST_GAIN = 1.3
"""Far from both 1 and what there is to gain (2 and more), so that noise does not decide."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
_KEPT = 2**30
_KEPT_OUTSIDE = 2**26
"""What glibc itself arrives at after some large blocks."""
_LARGEST_IN_HEAP = 2**25
"""The most that it allows; larger blocks are mapped one by one."""
_LARGEST_IN_LEAN_HEAP = 2**20
"""The same in `lean_cpu`: most weight matrices and activations of a model that is streamed are larger."""


@contextmanager
def fast_cpu() -> Iterator[None]:
    """Within it `fast_matmul` holds and freed memory is kept, for passes that take the same blocks again and again."""
    with fast_matmul(), _heap(largest=_LARGEST_IN_HEAP, kept=_KEPT):
        yield


@contextmanager
def lean_cpu() -> Iterator[None]:
    """Within it `fast_matmul` holds and what is freed is given back at once, for models larger than memory."""
    with fast_matmul(), _heap(largest=_LARGEST_IN_LEAN_HEAP, kept=_KEPT_OUTSIDE):
        yield


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Within it float32 products run on the faster library; it may be entered within itself.

    Not to be held across the yields of a generator: what it changes is the thread's, not the block's.
    """
    if _OneDnnMatmul.is_active() or matmul_library() == "torch":
        yield
        return
    mode: Any = _OneDnnMatmul
    with mode():
        yield


class _OneDnnMatmul(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands large float32 products on the CPU to oneDNN, those of a backward pass too."""

    @classmethod
    def is_active(cls) -> bool:
        """Whether the code that asks runs within one."""
        return any(isinstance(mode, cls) for mode in _get_current_dispatch_mode_stack())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.mm.default and _pays(*args):
            return _onednn(*args)
        if func is torch.ops.aten.addmm.default and not kwargs and args[0].ndim == 1 and _pays(*args[1:]):
            return _onednn(args[1], args[2], args[0])
        if func is torch.ops.aten.addmm_.default and not kwargs and _pays(*args[1:]):
            return args[0].add_(_onednn(*args[1:]))
        return func(*args, **(kwargs or {}))


def _pays(left_MK: Tensor, right_KN: Tensor) -> bool:
    return (
        left_MK.dtype is torch.float32 is right_KN.dtype
        and left_MK.device.type == "cpu" == right_KN.device.type
        and left_MK.numel() * right_KN.shape[1] >= _LEAST_PRODUCTS
    )


def _onednn(left_MK: Tensor, right_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    product_MN: Tensor = torch.ops.mkldnn._linear_pointwise(left_MK, right_KN.t(), bias_N, "none", [], "")
    return product_MN


@cache
def matmul_library() -> MatmulLibrary:
    """The library that float32 products run on here, within `fast_cpu`."""
    mkldnn: Any = torch.backends.mkldnn
    if not mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch"
    left, right = torch.ones(512, 576), torch.ones(576, 1024)
    with torch.no_grad():
        ours, theirs = fastest(lambda: _onednn(left, right), 7), fastest(lambda: torch.mm(left, right), 7)
    return "onednn" if theirs > _LEAST_GAIN * ours else "torch"


def return_surplus() -> None:
    """Give back what is free of the heap where that is more than is meant to be kept.

    Blocks of ever other sizes, as models with other widths in every layer ask for, leave holes between them.
    """
    libc = _glibc()
    if libc is not None:
        heap = libc.mallinfo2()
        if _private_bytes() - heap.uordblks - heap.hblkhd > _KEPT:
            libc.malloc_trim(0)


def _private_bytes() -> int:
    """Resident memory of this process that is no file's."""
    _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _heap(*, largest: int, kept: int) -> Iterator[None]:
    """Blocks up to ``largest`` bytes come from the heap, of which ``kept`` stay where they are free."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, largest)
    libc.mallopt(_TRIM_THRESHOLD, kept)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_OUTSIDE)
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library of this process; None where it is not glibc on Linux."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    if not all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "mallinfo2")):
        return None
    libc.mallinfo2.restype = _MallInfo
    return libc


_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    """What glibc tells of its heap, in bytes or blocks."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)
