"""FLAP: units whose inputs fluctuate little leave, and a bias puts back their mean.

Source: FLAP (arXiv:2312.11983). Channels of the inputs of o_proj and down_proj are scored on the dense model, in one
pass: the fluctuation of input channel j is its sample variance over the calibration data, and WIFV weighs it by the
squared norm of the weights that read it, S_j = fluc_j ||W_:j||^2. Scores are standardised in every layer, so that units
of all layers compete, and what a removed channel gave on average becomes a bias, b = W_:removed mean_removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from baselines.activations import InputStatistics, input_statistics
from baselines.ratio import Scores, keep_highest, meet_target, uniform_priority
from harness.errors import UserError
from harness.method import Footprint, LoadedModel, ParameterTarget, PrunedModel, ReimplementedMethod
from harness.models import rebuilt, state_of, weight_of
from harness.structure import CoupledGroup, KeepPlan, ModelStructure, apply_plan
from harness.weights import read


class FLAP(ReimplementedMethod):
    """FLAP with its adaptive structure search and bias compensation.

    Differs:
        - A unit of attention is a kv head with its query group, whose score is the mean over all its query channels and
          whose cost is its own parameters, (2 G + 2) D / 3 MLP channels; the published code prunes multi-head models
          only, at 4 D / 3 channels, truncated (``head_cost``).
        - The ratio is solved for the counted parameters, added biases included; where the next unit in line is too
          large, MLP channels of the lowest scores make up the rest.
        - An existing bias is added to; the published code overwrites it. Means keep float64 until the bias is made; the
          published code rounds them to float16.
    """

    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = "arXiv:2312.11983"
    published: ClassVar[Mapping[str, JsonValue]] = {"head_cost": "published"}
    variants: ClassVar[tuple[Mapping[str, JsonValue], ...]] = (
        {"head_cost": "published"},
        {"fluctuation": "variance"},
        {"square_attention": False},
        {"bias_compensation": False},
        {"pass_dtype": "bfloat16"},
    )

    metric: Literal["wifv", "ifv", "wifn"] = "wifv"
    """Channel score: weighted fluctuation, plain fluctuation, or weighted norm (that of Wanda)."""
    structure: Literal["al_am", "al_mm", "ul_mm", "ul_um"] = "al_am"
    """How layers (AL: all compete, UL: each alone) and modules (AM: heads and channels compete, MM: a given number of
    heads, UM: the same ratio of both) share the removal."""
    fluctuation: Literal["published", "variance"] = "published"
    """``published`` is the published code's running update, which departs from the paper's sample ``variance``: the
    first sequence counts for nothing and every other around the mean so far (SmolLM2 at 20% of the
    parameters: the loss is 0.005 lower than with ``variance``)."""
    square_attention: bool = True
    """Square the o_proj metric once more, as the published code does and the paper does not say (SmolLM2 at 20% of
    the parameters: the loss is 0.07 higher with it)."""
    bias_compensation: bool = True
    """Put the mean of what was removed into the biases of o_proj and down_proj."""
    remove_heads: Annotated[int, Field(ge=0)] = 8
    """Attention units removed over all layers, in ``al_mm`` and ``ul_mm``; fewer where the ratio pays for fewer."""
    head_cost: Literal["published"] | Annotated[float, Field(gt=0)] | None = None
    """MLP channels that one attention unit costs in the competition of ``al_am``; None is exact, ``published`` the
    published code's 4 D / 3, truncated. It says how far a ratio reaches; at a given size the ranking decides alone."""
    pass_dtype: Literal["weights", "bfloat16"] = "weights"
    """Type the forward pass computes in: the weights' own, or bfloat16 (SmolLM2 at ratio 0.2 on a
    processor that computes in it: 0.6 of the time, 99.9% of the same units, loss within 0.001)."""

    def prune(
        self, loaded: LoadedModel, calibration: Tensor, targets: Sequence[ParameterTarget], seed: int
    ) -> Iterator[PrunedModel]:
        """One model per target, all from one forward pass; nothing is random.

        Raises:
            UserError: there are fewer than two calibration sequences.
        """
        structure = loaded.structure
        statistics = self.statistics(loaded, calibration)
        scores = self.scores(loaded.model, structure, statistics)
        priority = self._last_stretch(scores, structure)
        added = len(self._new_biases(loaded)) * structure.hidden_size
        for target in targets:
            plan_at = partial(self.plan_at, scores, structure)
            solved = meet_target(
                self.name, plan_at, structure, target, priority, added_params=added, min_channels=0, scores=scores
            )
            yield PrunedModel(self.compress(loaded, solved.plan, statistics), solved.knob, kept=solved.plan)

    def prune_at(self, loaded: LoadedModel, calibration: Tensor, knob: float, seed: int) -> PrunedModel:
        """One model at a pruning ratio, a fraction of the cost of all units; nothing is random."""
        statistics = self.statistics(loaded, calibration)
        plan = self.plan_at(self.scores(loaded.model, loaded.structure, statistics), loaded.structure, knob)
        return PrunedModel(self.compress(loaded, plan, statistics), {"pruning_ratio": knob}, kept=plan)

    def working_bytes(self, footprint: Footprint) -> int:
        """A micro-batch of 512 tokens, or later a pruned copy; one matrix and its squares in float64 beside either."""
        one_matrix = 2 * 8 * footprint.largest_matrix
        return max(footprint.forward_bytes(512), footprint.copy_bytes) + one_matrix

    def statistics(self, loaded: LoadedModel, calibration: Tensor) -> dict[str, InputStatistics]:
        """Module name (every o_proj and down_proj with something to remove) -> statistics of its input.

        Args:
            loaded: the dense model.
            calibration: token ids [B, T], B >= 2.
        """
        if calibration.shape[0] < 2:
            raise UserError(
                f"{self.name} measures how inputs vary between sequences and got {calibration.shape[0]}; "
                "pass at least 2 calibration samples"
            )
        modules = [_output_map(group) for group in loaded.structure.groups if group.num_units]
        return input_statistics(loaded.model, modules, calibration, bfloat16=self.pass_dtype == "bfloat16")

    def scores(
        self, model: Any, structure: ModelStructure, statistics: Mapping[str, InputStatistics]
    ) -> dict[str, Tensor]:
        """Group name -> score per unit [num_units] in float64, higher is kept.

        AL structures compare layers: channels are standardised within their layer and kind, and an attention unit takes
        the mean of its channels. UL structures do not, and take the sum.
        """
        scores = {}
        for group in structure.groups:
            if not group.num_units:
                continue
            channels_C = self.channel_metric(model, group, statistics[_output_map(group)])
            if self.structure.startswith("al"):
                scores[group.name] = _standardised(channels_C).view(group.num_units, -1).mean(1)
            else:
                scores[group.name] = channels_C.view(group.num_units, -1).sum(1)
        return scores

    def channel_metric(self, model: Any, group: CoupledGroup, statistics: InputStatistics) -> Tensor:
        """Score of every input channel of a group's output map before standardisation, float64: [C].

        Source: FLAP (arXiv:2312.11983); its published code for the second square on attention.
        """
        weight_OC = weight_of(model, _output_map(group)).double()
        if self.metric == "wifn":
            metric_C = weight_OC.abs().mean(0) * statistics.power.sqrt()
        else:
            published = self.fluctuation == "published"
            metric_C = statistics.running_fluctuation if published else statistics.variance
            if self.metric == "wifv":
                metric_C = metric_C * weight_OC.square().sum(0)
        squared = group.kind == "kv_head" and self.square_attention
        return (metric_C.square() if squared else metric_C).cpu()

    def plan_at(self, scores: Scores, structure: ModelStructure, ratio: float) -> dict[str, Tensor]:
        """The published plan at a pruning ratio, a fraction of the cost of all units."""
        if ratio == 0:  # the unit at the cut always leaves
            return {name: torch.arange(values.numel()) for name, values in scores.items()}
        if self.structure == "al_am":
            return self._compete(scores, structure, ratio)
        if self.structure == "al_mm":
            heads, channels = self._split(scores, structure, ratio, self.remove_heads)
            kinds = (structure.attention, heads), (structure.mlp, channels)
            pools = [([g.name for g in groups if g.name in scores], num) for groups, num in kinds]
            return {name: kept for names, num in pools for name, kept in _drop_lowest(scores, names, num).items()}
        return {
            name: keep_highest(values, values.numel() - self._removed_in_layer(scores, structure, name, ratio))
            for name, values in scores.items()
        }

    def compress(self, loaded: LoadedModel, plan: KeepPlan, statistics: Mapping[str, InputStatistics]) -> Any:
        """The model under a plan, with the mean of what was removed in its biases.

        Source: FLAP (arXiv:2312.11983): W x becomes W_kept x_kept + W_removed mean_removed, with dense W and mean.
        """
        structure = loaded.structure
        dense = state_of(loaded.model)
        state = dict(apply_plan(dense, structure, plan))
        if self.bias_compensation:
            for name in self._new_biases(loaded):
                dtype = dense[f"{name.removesuffix('.bias')}.weight"].dtype
                state[name] = torch.zeros(structure.hidden_size, dtype=dtype, device=loaded.model.device)
            for group in structure.groups:
                if group.name in plan:
                    name = f"{_output_map(group)}.bias"
                    lost = _lost_mean(loaded.model, group, plan[group.name], statistics[_output_map(group)])
                    bias = read(state[name])
                    state[name] = (bias.to(lost.device).double() + lost).to(bias.dtype)
        return rebuilt(loaded.model, state)

    def _compete(self, scores: Scores, structure: ModelStructure, ratio: float) -> dict[str, Tensor]:
        """Heads and channels of all layers in one ranking, cut where the kept cost comes nearest to 1 - ratio."""
        values = torch.cat(list(scores.values()))
        costs = torch.cat([torch.full((v.numel(),), self._cost(structure, n)) for n, v in scores.items()])
        order = values.argsort(descending=True, stable=True)
        kept_cost = costs[order].double().cumsum(0)
        threshold = values[order[(kept_cost - costs.double().sum() * (1 - ratio)).abs().argmin()]]
        return {name: (v > threshold).nonzero().flatten() for name, v in scores.items()}

    def _cost(self, structure: ModelStructure, name: str) -> float:
        """What one unit of a group costs, in MLP channels."""
        group = structure.by_name[name]
        if group.kind == "mlp_channel":
            return 1.0
        if self.head_cost == "published":
            return 4 * structure.head_dim // 3
        return self._exact_head_cost(structure) if self.head_cost is None else self.head_cost

    @staticmethod
    def _exact_head_cost(structure: ModelStructure) -> float:
        """(2 G + 2) D / 3 without biases: parameters of an attention unit over those of an MLP channel."""
        head = next((group.unit_params for group in structure.attention if group.num_units), 0)
        channel = next((group.unit_params for group in structure.mlp if group.num_units), 1)
        return head / channel

    def _split(self, scores: Scores, structure: ModelStructure, ratio: float, heads: int) -> tuple[int, int]:
        """Attention units and MLP channels to remove from the groups in ``scores``, at most ``heads`` of the former."""
        cost = self._exact_head_cost(structure)
        count = {"kv_head": 0, "mlp_channel": 0}
        for name, values in scores.items():
            count[structure.by_name[name].kind] += values.numel()
        budget = ratio * (count["kv_head"] * cost + count["mlp_channel"])
        heads = min(heads, count["kv_head"], int(budget / cost) if cost else 0)
        return heads, min(int(budget - heads * cost), count["mlp_channel"])

    def _removed_in_layer(self, scores: Scores, structure: ModelStructure, name: str, ratio: float) -> int:
        """Units that a group loses in the structures that treat every layer alike."""
        group = structure.by_name[name]
        if self.structure == "ul_um":
            return int(group.num_units * ratio)
        layer = {g.name: scores[g.name] for g in structure.groups if g.layer == group.layer and g.name in scores}
        heads, channels = self._split(layer, structure, ratio, self.remove_heads // structure.num_layers)
        return heads if group.kind == "kv_head" else channels

    def _last_stretch(self, scores: Scores, structure: ModelStructure) -> dict[str, Tensor]:
        """Order in which single channels leave: by their score where layers compete, by their rank where not."""
        ranks = uniform_priority(scores, structure)
        return {name: scores[name] for name in ranks} if self.structure.startswith("al") else ranks

    def _new_biases(self, loaded: LoadedModel) -> list[str]:
        """Names of the biases that compensation adds: o_proj's and down_proj's, in every layer that has none."""
        if not self.bias_compensation:
            return []
        maps = [_output_map(group) for group in loaded.structure.groups]
        return [f"{name}.bias" for name in maps if loaded.model.get_submodule(name).bias is None]


def _output_map(group: CoupledGroup) -> str:
    """The map that reads the group's channels: o_proj or down_proj."""
    return next(member.module for member in group.members if member.dim == 1)


def _standardised(metric_C: Tensor) -> Tensor:
    """Distance from the layer's mean in its standard deviations; 0 where the layer's channels are all equal: [C]."""
    centred_C = metric_C - metric_C.mean()
    deviation = (centred_C.square().sum() / max(metric_C.numel() - 1, 1)).sqrt()
    return centred_C / deviation if deviation > 0 else torch.zeros_like(centred_C)


def _drop_lowest(scores: Scores, names: Sequence[str], num_removed: int) -> dict[str, Tensor]:
    """Kept units when the lowest ``num_removed`` of all groups in ``names`` leave."""
    kept = torch.ones(sum(scores[name].numel() for name in names), dtype=torch.bool)
    kept[torch.cat([scores[name] for name in names]).argsort(stable=True)[:num_removed]] = False
    plan, start = {}, 0
    for name in names:
        plan[name] = kept[start : start + scores[name].numel()].nonzero().flatten()
        start += scores[name].numel()
    return plan


def _lost_mean(model: Any, group: CoupledGroup, kept: Tensor, statistics: InputStatistics) -> Tensor:
    """Mean over the calibration tokens of what the removed units gave to the output map, float64: [hidden_size]."""
    member = next(member for member in group.members if member.dim == 1)
    removed = torch.ones(group.num_units, dtype=torch.bool)
    removed[kept] = False
    weight = weight_of(model, member.module)
    positions = member.positions(removed.nonzero().flatten()).to(weight.device)
    return weight[:, positions].double() @ statistics.mean[positions]
