"""Watching a model run: gradients of weights tapped at their maps' outputs, and every layer's input and output.

Shape letters: B samples, T tokens of a sample, N tokens in all, H hidden_size, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.models import weight_of

Moments = Literal["gradient", "squared", "both"]
"""What a pass gathers: the gradient of the loss, the mean of the squared per-sample gradients, or both."""

Reducer = Callable[[str, Tensor, Tensor | None, Tensor | None], None]
"""Called once per weight with module name, weight [O, I], gradient [O, I] and squared gradients [O, I] (None where not
asked for); both may be overwritten."""

LayerObserver = Callable[[int, Tensor, Tensor], None]
"""Called in every micro-batch with layer index and the layer's input and output residual stream [B, T, H]."""


@dataclass(frozen=True)
class Gathering:
    """What a gradient pass gathers and how, whichever way it takes through the model."""

    modules: Sequence[str]
    """Linear maps whose weights' gradients are wanted."""
    reduce: Reducer
    moments: Moments
    rows: int
    """Samples of a micro-batch."""
    bfloat16: bool
    """Let the matrix products run in bfloat16."""
    on_layer: LayerObserver | None

    def micro_batches(self, num_samples: int) -> list[slice]:
        """The samples of every micro-batch."""
        return [slice(start, start + self.rows) for start in range(0, num_samples, self.rows)]


@dataclass
class Tap:
    """Gathers the moments of one weight's gradient from the map's inputs and its outputs' gradients."""

    model: Any
    module: str
    moments: Moments
    num_samples: int
    reduce: Reducer | None = None
    """Set for the last micro-batch."""
    gradient: Tensor | None = None
    squared: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    """Of the applications in this micro-batch that have no slope yet: one, or as many as the layer is repeated."""
    applications: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Slope and input of those that have one."""

    def on_forward(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Remember the input; ask for the output's gradient, as a leaf where nothing before it needs one."""
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self.inputs.append(args[0].detach())
        output.register_hook(self.on_backward)  # type: ignore[no-untyped-call]
        return output

    def on_backward(self, slope_BTO: Tensor) -> None:
        """Add this micro-batch's gradient, and hand over the sum after the last one.

        A weight that is applied several times has the sum of all its applications' gradients.
        """
        self.applications.append((slope_BTO, self.inputs.pop()))
        if self.inputs:
            return
        if self.moments != "squared":
            for slope, given in self.applications:
                self._add_gradient(slope.flatten(0, -2), given.flatten(0, -2))
        if self.moments != "gradient":
            self._add_squares()
        self.applications.clear()
        if self.reduce is not None:
            self.reduce(self.module, weight_of(self.model, self.module), self.gradient, self.squared)
            self.gradient = self.squared = None

    def _add_gradient(self, slope_NO: Tensor, input_NI: Tensor) -> None:
        input_NI = input_NI.to(slope_NO.dtype)  # under autocast a float32 input meets a bfloat16 slope
        if self.gradient is not None and self.gradient.dtype == slope_NO.dtype:
            self.gradient.addmm_(slope_NO.T, input_NI)
            return
        product = (slope_NO.T @ input_NI).to(torch.promote_types(slope_NO.dtype, torch.float32))
        self.gradient = product if self.gradient is None else self.gradient.add_(product)

    def _add_squares(self) -> None:
        dtype = self.applications[0][0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        for b in range(self.applications[0][0].shape[0]):
            # The batch's loss is the mean of the samples' mean losses, so this is 1/B of the sample's own gradient.
            products = [(slope[b].T @ given[b].to(dtype)).to(wide) for slope, given in self.applications]
            sample = products[0]
            for product in products[1:]:
                sample += product
            if self.squared is None:
                self.squared = sample.square_().mul_(self.num_samples)
            else:
                self.squared.addcmul_(sample, sample, value=self.num_samples)


@contextmanager
def tapped(model: Any, module: str, moments: Moments, num_samples: int) -> Iterator[Tap]:
    """While open, every forward and backward through a linear map is seen by a tap."""
    tap = Tap(model, module, moments, num_samples)
    handle = model.get_submodule(module).register_forward_hook(tap.on_forward)
    try:
        yield tap
    finally:
        handle.remove()


def stream_into(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream that a decoder layer is called with [B, T, H]."""
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream


def stream_out_of(output: Any) -> Tensor:
    """The residual stream in what a decoder layer returns [B, T, H]."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream


@contextmanager
def layers_observed(model: Any, on_layer: LayerObserver) -> Iterator[None]:
    """While open, every forward through the model's decoder layers is shown to ``on_layer``."""

    def hook(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            with torch.no_grad():
                on_layer(index, stream_into(args, kwargs).detach(), stream_out_of(output).detach())

        return observe

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
