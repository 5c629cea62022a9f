"""Coupled structures of a Llama-family decoder, keep plans, and what they cost in parameters.

A kv head is removed with its query group, an MLP channel with its gate, up and down slices; norms, embeddings, head and
the residual width stay (only SliceGPT changes the residual width, and does so on its own).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.records import LayerWidths, ParamCounts
from harness.weights import Weight

KeepPlan = Mapping[str, Tensor]
"""Group name -> sorted, unique int64 indices of the units kept, [num_kept]; a group that is absent is kept whole."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Member:
    """The slices of one linear map that belong to the units of a group."""

    module: str
    """Name in the model, such as ``model.layers.3.self_attn.q_proj``."""
    dim: Literal[0, 1]
    """0: a unit is output rows (and their biases); 1: input columns."""
    block: int
    """Rows or columns per unit: 1, head_dim, or query group size x head_dim."""

    def positions(self, units: Tensor) -> Tensor:
        """Row or column indices of ``units`` [n], in the order of the units: [n * block]."""
        offsets = torch.arange(self.block, device=units.device)
        return (units[:, None] * self.block + offsets).flatten()


@dataclass(frozen=True, slots=True)
class CoupledGroup:
    """Units that leave all members together, or stay."""

    name: str
    """``layers.3.attention`` or ``layers.3.mlp``: the key of plans, scores and logs."""
    layer: int
    kind: Literal["kv_head", "mlp_channel"]
    num_units: int
    unit_params: int
    """Parameters that leave with one unit, biases included."""
    members: tuple[Member, ...]


@dataclass(frozen=True)
class ModelStructure:
    """What can be removed from a model, layer by layer."""

    num_layers: int
    hidden_size: int
    head_dim: int
    query_group_size: int
    """Query heads per kv head."""
    groups: tuple[CoupledGroup, ...]
    """For each layer in order: its kv heads, then its MLP channels."""
    model_type: str
    """transformers' ``model_type`` of the dense model."""
    layer_repeats: int = 1
    """Times in a row that every layer is applied; its units are counted and removed once."""

    @cached_property
    def by_name(self) -> dict[str, CoupledGroup]:
        """The groups by their names."""
        return {group.name: group for group in self.groups}

    def of_kind(self, kind: Literal["kv_head", "mlp_channel"]) -> tuple[CoupledGroup, ...]:
        """The groups of one kind, one a layer, in the order of the layers."""
        return tuple(group for group in self.groups if group.kind == kind)

    @property
    def attention(self) -> tuple[CoupledGroup, ...]:
        """The kv heads of every layer."""
        return self.of_kind("kv_head")

    @property
    def mlp(self) -> tuple[CoupledGroup, ...]:
        """The MLP channels of every layer."""
        return self.of_kind("mlp_channel")

    @property
    def prunable_params(self) -> int:
        """Parameters that removing every unit would remove."""
        return sum(group.num_units * group.unit_params for group in self.groups)


def describe(model: nn.Module) -> ModelStructure:
    """Read the coupled structure off a model's modules.

    Raises:
        UserError: the model is not laid out like a Llama (q, k, v, o and gate, up, down projections in
            ``model.layers``); the first missing part is named.
    """
    num_layers = len(list(_part(model, "model.layers").children()))
    config: Any = model.config
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    group_size = _query_group_size(config)
    groups: list[CoupledGroup] = []
    for i in range(num_layers):
        groups.append(_attention_group(model, i, head_dim, group_size))
        groups.append(_mlp_group(model, i))
    return ModelStructure(
        num_layers=num_layers,
        hidden_size=int(config.hidden_size),
        head_dim=head_dim,
        query_group_size=group_size,
        groups=tuple(groups),
        model_type=str(config.model_type),
        layer_repeats=int(getattr(config, "layer_repeats", 1)),
    )


def apply_plan(state: Mapping[str, Weight], structure: ModelStructure, plan: KeepPlan) -> Iterator[tuple[str, Weight]]:
    """Name and weight of every parameter that is left, those without a removed unit unchanged (not copied).

    Args:
        state: parameters of the model that ``structure`` describes, by name; those in files are cut without a look.
        structure: its coupled groups.
        plan: units to keep; checked by ``check_plan``.
    """
    check_plan(structure, plan)
    cuts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, kept in plan.items():
        group = structure.by_name[name]
        if kept.numel() == group.num_units:
            continue
        for member in group.members:
            cuts.setdefault(member.module, []).append((member.dim, member.positions(kept)))
    for name, weight in state.items():
        module, _, leaf = name.rpartition(".")
        cut = weight.detach()
        for dim, positions in cuts.get(module, ()):
            if leaf == "weight" or dim == 0:
                cut = cut.index_select(dim, positions.to(cut.device))
        yield name, cut


def check_plan(structure: ModelStructure, plan: KeepPlan) -> None:
    """Assert that a plan names known groups and holds sorted, unique indices inside them."""
    for name, kept in plan.items():
        group = structure.by_name[name]
        assert kept.dtype == torch.int64, f"{name}: indices must be int64, not {kept.dtype}"
        assert kept.ndim == 1, f"{name}: indices must be [num_kept], not {tuple(kept.shape)}"
        if kept.numel():
            assert bool((kept.diff() > 0).all()), f"{name}: indices must be sorted and unique"
            assert int(kept[0]) >= 0, f"{name}: negative index"
            assert int(kept[-1]) < group.num_units, f"{name}: index beyond {group.num_units} units"


def removed_params(structure: ModelStructure, plan: KeepPlan) -> int:
    """Parameters that leave the model under a plan."""
    return sum(
        (structure.by_name[name].num_units - kept.numel()) * structure.by_name[name].unit_params
        for name, kept in plan.items()
    )


def compose(first: KeepPlan, then: KeepPlan) -> dict[str, Tensor]:
    """One plan in the numbering of ``first`` that does what ``first`` and then ``then`` do."""
    return {name: kept[then[name]] if name in then else kept for name, kept in first.items()} | {
        name: kept for name, kept in then.items() if name not in first
    }


def left_of(structure: ModelStructure, before: KeepPlan, after: KeepPlan) -> dict[str, Tensor]:
    """The plan, in the numbering of the model that ``before`` left, that leads to ``after``: undoes ``compose``.

    Args:
        structure: of the dense model.
        before: units of it.
        after: units of it, all of them among those of ``before``.
    """
    plan = {}
    for name, kept in after.items():
        held = before.get(name, torch.arange(structure.by_name[name].num_units))
        plan[name] = torch.nonzero(torch.isin(held, kept)).flatten()
    return plan


def count_parameters(named: Iterable[tuple[str, Tensor]]) -> ParamCounts:
    """Count parameters by what they do, each tensor once.

    Args:
        named: ``model.named_parameters()`` (which names a tied tensor once).
    """
    counts = {"embedding": 0, "attention": 0, "mlp": 0, "extra": 0}
    for name, tensor in named:
        parts = name.split(".")
        if "embed_tokens" in parts or "lm_head" in parts:
            kind = "embedding"
        elif any(part in ATTENTION for part in parts):
            kind = "attention"
        elif any(part in MLP for part in parts):
            kind = "mlp"
        else:
            kind = "extra"
        counts[kind] += tensor.numel()
    return ParamCounts(total=sum(counts.values()), **counts)


def layer_widths(structure: ModelStructure) -> tuple[LayerWidths, ...]:
    """What every layer holds."""
    return tuple(
        LayerWidths(num_key_value_heads=heads.num_units, intermediate_size=channels.num_units)
        for heads, channels in zip(structure.attention, structure.mlp, strict=True)
    )


def _query_group_size(config: Any) -> int:
    # A heterogeneous configuration keeps the dense model's head counts; their ratio holds in every layer.
    dense = config.alike() if hasattr(config, "alike") else config
    return int(dense.num_attention_heads) // int(dense.num_key_value_heads)


def _attention_group(model: nn.Module, layer: int, head_dim: int, group_size: int) -> CoupledGroup:
    prefix = f"model.layers.{layer}.self_attn"
    members = (
        Member(f"{prefix}.q_proj", 0, group_size * head_dim),
        Member(f"{prefix}.k_proj", 0, head_dim),
        Member(f"{prefix}.v_proj", 0, head_dim),
        Member(f"{prefix}.o_proj", 1, group_size * head_dim),
    )
    num_heads = _linear(model, f"{prefix}.k_proj").out_features // head_dim
    return _group(model, f"layers.{layer}.attention", layer, "kv_head", num_heads, members)


def _mlp_group(model: nn.Module, layer: int) -> CoupledGroup:
    prefix = f"model.layers.{layer}.mlp"
    members = (
        Member(f"{prefix}.gate_proj", 0, 1),
        Member(f"{prefix}.up_proj", 0, 1),
        Member(f"{prefix}.down_proj", 1, 1),
    )
    num_channels = _linear(model, f"{prefix}.gate_proj").out_features
    return _group(model, f"layers.{layer}.mlp", layer, "mlp_channel", num_channels, members)


def _group(
    model: nn.Module,
    name: str,
    layer: int,
    kind: Literal["kv_head", "mlp_channel"],
    num_units: int,
    members: tuple[Member, ...],
) -> CoupledGroup:
    unit_params = 0
    for member in members:
        linear = _linear(model, member.module)
        size = linear.out_features if member.dim == 0 else linear.in_features
        if size != num_units * member.block:
            raise UserError(
                f"{member.module} has {size} {'rows' if member.dim == 0 else 'columns'} where {num_units} units of "
                f"{member.block} were expected; pass a model whose weights agree with its configuration"
            )
        other = linear.in_features if member.dim == 0 else linear.out_features
        bias = member.block if member.dim == 0 and linear.bias is not None else 0
        unit_params += member.block * other + bias
    return CoupledGroup(name, layer, kind, num_units, unit_params, members)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = _part(model, name)
    if not isinstance(module, nn.Linear):
        raise UserError(f"{name} is a {type(module).__name__}, not a plain linear map; load the model unquantised")
    return module


def _part(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"{type(model).__name__} has no {name}; models laid out like Llama can be pruned "
            "(Llama, Mistral, Qwen2, Qwen3 and those that share their layout)"
        ) from None
