"""The training loss as a module, so that what spreads models over devices can wrap it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.records import TrainingSpec
from harness.token_loss import Teacher, token_loss


class TrainingLoss(nn.Module):
    """A causal language model whose forward pass gives its loss on some windows.

    Args:
        model: learns; ``model.model`` gives hidden states, ``model.lm_head`` holds the output head.
        spec: autocast and distillation.
        teacher: dense model to distil from, no part of the module; None trains on the text alone.
    """

    def __init__(self, model: Any, spec: TrainingSpec, teacher: Any = None) -> None:
        super().__init__()
        self.model = model
        self._narrow = spec.autocast == "bfloat16"
        self._spec = spec
        self._teacher = [teacher]  # in a list, so that its parameters are not this module's

    def forward(self, tokens_BT: Tensor, scored_BT: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """``weight`` times the summed loss of the scored tokens, and their summed cross-entropy; float64 scalars."""
        predicting = scored_BT[:, 1:]
        hidden_NH = self._states(self.model, tokens_BT, predicting)
        weight_N = torch.full((len(hidden_NH),), weight, dtype=torch.float64, device=hidden_NH.device)
        targets = tokens_BT[:, 1:][predicting]
        teacher = self._known(tokens_BT, predicting)
        return token_loss(hidden_NH, self.model.lm_head.weight, targets, weight_N, teacher)

    def _known(self, tokens_BT: Tensor, predicting: Tensor) -> Teacher | None:
        (teacher,) = self._teacher
        if teacher is None or not self._spec.distillation:
            return None
        with torch.no_grad():
            known_Nh = self._states(teacher, tokens_BT, predicting)
        return Teacher(known_Nh, teacher.lm_head.weight, self._spec.temperature, self._spec.distillation)

    def _states(self, model: Any, tokens_BT: Tensor, predicting: Tensor) -> Tensor:
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=self._narrow):
            hidden_BTH: Tensor = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        return hidden_BTH[:, :-1][predicting].to(torch.bfloat16 if self._narrow else hidden_BTH.dtype)
