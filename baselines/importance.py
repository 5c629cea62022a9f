"""Scoring maths shared by methods that rank units by weights: tensors in, one score per unit out; no model, no I/O.

Two steps, as LLM-Pruner (arXiv:2305.11627) has them. First every matrix of a coupled group gives a number per channel
(a row or a column of it), then the matrices of the group are combined, and a kv head takes the sum of its channels.

Shape letters: O, I a linear map's outputs and inputs; C channels of a matrix; K kv heads; G query heads per kv head;
D head_dim; U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from harness.structure import CoupledGroup

Criterion = Literal["l1", "l2", "param_first", "param_second", "param_mix", "vectorize"]
"""What a channel of one matrix scores; see ``channel_scores``."""

Grouping = Literal["sum", "max", "mean", "first", "product"]
"""How the scores of a group's matrices become one; see ``combine_members``."""

QueryFold = Literal["group", "upstream"]
"""Which kv head the channels of a query head count for; see ``fold_query_channels``."""

TAYLOR: frozenset[str] = frozenset({"param_first", "param_second", "param_mix", "vectorize"})
"""Criteria that need a gradient or its square; the others look at the weights alone."""


def channel_scores(
    weight_OI: Tensor,
    criterion: Criterion,
    dim: Literal[0, 1],
    gradient_OI: Tensor | None = None,
    squared_OI: Tensor | None = None,
) -> Tensor:
    """A number per row (``dim`` 0) or per column (``dim`` 1) of one matrix, at least float32: [C].

    With w a weight, g its gradient, A the mean of its squared per-sample gradients, summed over the other dimension:
    ``l1`` |w|, ``l2`` w^2 (no root), ``param_first`` |w g|, ``param_second`` |w A w|, ``param_mix`` |w g - w A w / 2|;
    ``vectorize`` is |sum of w g|.

    Args:
        weight_OI: the matrix.
        criterion: one of the above.
        dim: 0 for rows, 1 for columns.
        gradient_OI: g; for ``param_first``, ``param_mix`` and ``vectorize``.
        squared_OI: A; for ``param_second`` and ``param_mix``.

    Source: LLM-Pruner (arXiv:2305.11627), eq. 4 (first and mixed terms, A for the Hessian's diagonal) and section 3.2.
    Differs: in float32 (float64 for float64 weights) whatever the weights' dtype; in float16 29% of A would be zero.
    """
    # bfloat16 and float16 are too coarse to add up a thousand products.
    weight = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
    other = 1 - dim
    if criterion == "l1":
        return weight.abs().sum(other)
    if criterion == "l2":
        return weight.square().sum(other)
    if criterion == "vectorize":
        return _first_term(weight, gradient_OI).sum(other).abs()
    return _salience(weight, criterion, gradient_OI, squared_OI).abs_().sum(other)


def combine_members(scores_MC: Tensor, grouping: Grouping) -> Tensor:
    """One score per channel from those of the M matrices of a group, the root (k_proj, gate_proj) first: [C].

    Source: LLM-Pruner (arXiv:2305.11627), section 3.2: summation, production, max, and the last-executing structure.
    Differs: ``first`` is the group's root, as in the published code; ``mean`` is the published code's too.
    """
    if grouping == "sum":
        return scores_MC.sum(0)
    if grouping == "mean":
        return scores_MC.mean(0)
    if grouping == "max":
        return scores_MC.amax(0)
    if grouping == "product":
        return scores_MC.prod(0)
    return scores_MC[0]


def fold_query_channels(query_C: Tensor, head_dim: int, query_group_size: int, fold: QueryFold = "group") -> Tensor:
    """Add the channels of query heads onto those of kv heads: [K * G * D] -> [K * D].

    Args:
        query_C: scores of q_proj's rows or o_proj's columns.
        head_dim: D.
        query_group_size: G.
        fold: ``group`` gives kv head j the query heads that it serves and that leave with it, jG .. jG + G - 1.
            ``upstream`` is the published code's: query head i counts for kv head i mod K, although it leaves with kv
            head i // G; kept for fidelity.
    """
    num_kv = query_C.numel() // (query_group_size * head_dim)
    if fold == "upstream":
        return query_C.view(query_group_size, num_kv * head_dim).sum(0)
    return query_C.view(num_kv, query_group_size, head_dim).sum(1).flatten()


def kv_head_scores(
    key_C: Tensor,
    query_C: Tensor,
    value_C: Tensor,
    output_C: Tensor,
    *,
    head_dim: int,
    query_group_size: int,
    grouping: Grouping = "sum",
    fold: QueryFold = "group",
) -> Tensor:
    """Score of each kv head with its query group, the sum over its D channels: [K].

    Args:
        key_C: scores of k_proj's rows [K * D].
        query_C: scores of q_proj's rows [K * G * D].
        value_C: scores of v_proj's rows [K * D].
        output_C: scores of o_proj's columns [K * G * D].
        head_dim: D.
        query_group_size: G.
        grouping: over the four matrices, channel by channel.
        fold: of query channels onto kv channels.
    """
    query = fold_query_channels(query_C, head_dim, query_group_size, fold)
    output = fold_query_channels(output_C, head_dim, query_group_size, fold)
    combined = combine_members(torch.stack((key_C, query, value_C, output)), grouping)
    return combined.view(-1, head_dim).sum(1)


def unit_scores(
    group: CoupledGroup,
    by_module: Mapping[str, Tensor],
    *,
    criterion: Criterion,
    head_dim: int,
    query_group_size: int,
    grouping: Grouping = "sum",
    fold: QueryFold = "group",
) -> Tensor:
    """Score of every unit of a group, higher is kept: [num_units].

    Args:
        group: kv heads or MLP channels.
        by_module: module name of every member -> its channel scores [C]; not looked at for a group without units.
        criterion: that they were made with; ``l1`` and ``l2`` are always combined by their mean.
        head_dim: D.
        query_group_size: G.
        grouping: over the matrices of the group.
        fold: of query channels onto kv channels.
    """
    if not group.num_units:
        return torch.empty(0)
    if criterion not in TAYLOR:
        grouping = "mean"
    by_leaf = {member.module.rpartition(".")[2]: by_module[member.module] for member in group.members}
    if group.kind == "kv_head":
        return kv_head_scores(
            by_leaf["k_proj"],
            by_leaf["q_proj"],
            by_leaf["v_proj"],
            by_leaf["o_proj"],
            head_dim=head_dim,
            query_group_size=query_group_size,
            grouping=grouping,
            fold=fold,
        )
    members: Sequence[Tensor] = (by_leaf["gate_proj"], by_leaf["up_proj"], by_leaf["down_proj"])
    return combine_members(torch.stack(tuple(members)), grouping)


def _salience(weight: Tensor, criterion: Criterion, gradient: Tensor | None, squared: Tensor | None) -> Tensor:
    """The signed Taylor term of every weight."""
    if criterion == "param_first":
        return _first_term(weight, gradient)
    assert squared is not None, f"{criterion} needs squared gradients"
    second = weight.square().mul_(squared)
    if criterion == "param_second":
        return second
    return _first_term(weight, gradient).sub_(second, alpha=0.5)


def _first_term(weight: Tensor, gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "this criterion needs gradients"
    return weight * gradient
