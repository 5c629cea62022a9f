"""How much each decoder layer changes the residual stream, which is how important it is.

Legend: B sequences, T tokens, H hidden size, L layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

LayerMetric = Literal["cosine", "manhattan", "euclidean"]
DistanceSign = Literal["sensible", "published"]


class LayerImportance:
    """Mean importance of every layer over the tokens of one pass, fed layer by layer while the pass runs."""

    def __init__(self, num_layers: int, metric: LayerMetric = "cosine", sign: DistanceSign = "sensible") -> None:
        self._metric = metric
        # Cosine is a similarity, so it is negated either way; the published code negates distances too.
        self._factor = -1.0 if metric == "cosine" or sign == "published" else 1.0
        self._sums_L = torch.zeros(num_layers, dtype=torch.float64)
        self._counts_L = torch.zeros(num_layers, dtype=torch.int64)

    def observe(self, layer: int, input_BTH: Tensor, output_BTH: Tensor) -> None:
        """Add the tokens of one forward through one layer.

        Args:
            layer: its index.
            input_BTH: residual stream before the layer, without padding.
            output_BTH: residual stream after it.
        """
        values_BT = compare(input_BTH.detach(), output_BTH.detach(), self._metric)
        self._sums_L[layer] += float(values_BT.double().sum())
        self._counts_L[layer] += values_BT.numel()

    def raw(self) -> Tensor:
        """Importance of each layer, higher for layers that change more, in the metric's own unit: float64 [L]."""
        assert bool((self._counts_L > 0).all()), "a layer was not observed"
        return self._factor * self._sums_L / self._counts_L


def compare(input_BTH: Tensor, output_BTH: Tensor, metric: LayerMetric) -> Tensor:
    """Per token, the cosine similarity of a layer's input and output, or the L1 / L2 norm of their difference: [B, T].

    In float32 at least: bfloat16 cannot tell the cosines of neighbouring layers apart.

    Source: Adapt-Pruner (arXiv:2502.03460), section 3.1.
    """
    if input_BTH.dtype != torch.float64:
        input_BTH, output_BTH = input_BTH.float(), output_BTH.float()
    if metric == "cosine":
        return nn.functional.cosine_similarity(input_BTH, output_BTH, dim=-1)
    order = 1 if metric == "manhattan" else 2
    norm_BT: Tensor = torch.linalg.vector_norm(output_BTH - input_BTH, ord=order, dim=-1)
    return norm_BT


def normalise(raw_L: Tensor) -> Tensor:
    """Importances with mean 0 and largest magnitude 1; all 0 where the layers do not differ: [L].

    Source: Adapt-Pruner (arXiv:2502.03460), section 3.2.
    """
    centred_L = raw_L - raw_L.mean()
    largest = centred_L.abs().max()
    # Below rounding, what is left of a mean of equal numbers is noise, and dividing by it would make it signal.
    number = torch.finfo(raw_L.dtype)
    if largest <= number.eps * raw_L.abs().max() * raw_L.numel() or largest < number.tiny:  # subnormal: no digits
        return torch.zeros_like(raw_L)
    return centred_L / largest
