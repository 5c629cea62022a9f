"""Coupled groups, keep plans and counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_pruning
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from harness.errors import UserError
from harness.models import LoadedModel, remove_units
from harness.structure import compose, count_parameters, describe, layer_widths, removed_params

MakeTiny = Callable[..., LoadedModel]


def test_smollm2_has_the_published_shape_and_count(smollm2: LoadedModel) -> None:
    structure = smollm2.structure
    assert smollm2.params.total == 134_515_008
    assert smollm2.params.embedding == 49152 * 576
    assert smollm2.params.attention == 30 * 2 * (576 * 576 + 192 * 576)
    assert smollm2.params.mlp == 30 * 3 * 1536 * 576
    assert smollm2.params.extra == 61 * 576
    assert (structure.num_layers, structure.head_dim, structure.query_group_size) == (30, 64, 3)
    # A kv head carries (2 G + 2) D h weights, a channel 3 h.
    assert {g.unit_params for g in structure.attention} == {(2 * 3 + 2) * 64 * 576}
    assert {g.unit_params for g in structure.mlp} == {3 * 576}


def test_kv_head_takes_its_query_group_along(make_tiny: MakeTiny) -> None:
    loaded = make_tiny("grouped-query")  # 6 query heads of 8 on 2 kv heads
    q_proj = loaded.model.model.layers[1].self_attn.q_proj.weight
    o_proj = loaded.model.model.layers[1].self_attn.o_proj.weight
    smaller = remove_units(loaded.model, loaded.structure, {"layers.1.attention": torch.tensor([1])})
    attention = smaller.model.layers[1].self_attn
    assert torch.equal(attention.q_proj.weight, q_proj[24:])
    assert torch.equal(attention.o_proj.weight, o_proj[:, 24:])
    assert attention.k_proj.out_features == attention.v_proj.out_features == 8


def test_slicing_equals_masking(tiny: LoadedModel, calibration: torch.Tensor) -> None:
    plan = {
        "layers.0.attention": torch.tensor([1]),
        "layers.1.mlp": torch.arange(0, 80, 3),
        "layers.2.attention": torch.tensor([0]),
        "layers.2.mlp": torch.tensor([], dtype=torch.int64),
    }
    sliced = remove_units(tiny.model, tiny.structure, plan)(calibration).logits
    with torch.no_grad():
        for name, kept in plan.items():
            group = tiny.structure.by_name[name]
            gone = torch.tensor(sorted(set(range(group.num_units)) - set(kept.tolist())))
            column_member = next(m for m in group.members if m.dim == 1)
            tiny.model.get_submodule(column_member.module).weight[:, column_member.positions(gone)] = 0
    assert torch.allclose(sliced, tiny.model(calibration).logits, atol=1e-12)


def test_removed_parameters_are_what_the_weights_lose(tiny: LoadedModel) -> None:
    plan = {"layers.0.attention": torch.tensor([0]), "layers.1.mlp": torch.arange(11, 50)}
    smaller = remove_units(tiny.model, tiny.structure, plan)
    after = count_parameters(smaller.named_parameters())
    assert tiny.params.total - after.total == removed_params(tiny.structure, plan)
    assert after.embedding == tiny.params.embedding
    assert layer_widths(describe(smaller))[1].intermediate_size == 39


def test_groups_are_those_of_torch_prunings_dependency_graph(make_tiny: MakeTiny) -> None:
    loaded = make_tiny("multi-head", torch.float32)
    model = loaded.model.requires_grad_(True)
    model.config.use_cache = False  # the trace does not follow keys into a cache
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=torch.zeros(1, 8, dtype=torch.int64), forward_fn=lambda m, x: m(x).logits
    )
    for group in loaded.structure.groups:
        first = group.members[1]  # k_proj or up_proj
        unit = torch.tensor([1])
        traced = graph.get_pruning_group(
            model.get_submodule(first.module), torch_pruning.prune_linear_out_channels, first.positions(unit).tolist()
        )
        found = {
            (dep.target.name.split(" ")[0], 0 if "out" in dep.handler.__name__ else 1, tuple(indices))
            for dep, indices in traced
            if isinstance(dep.target.module, nn.Linear)
        }
        ours = {(m.module, m.dim, tuple(m.positions(unit).tolist())) for m in group.members}
        assert found == ours


def test_a_model_of_another_layout_is_refused_by_the_missing_part() -> None:
    with pytest.raises(UserError, match=r"Linear has no model\.layers"):
        describe(nn.Linear(2, 2))


@given(st.sets(st.integers(0, 19), min_size=1), st.data())
def test_composed_plans_do_both_in_the_first_numbering(first: set[int], data: st.DataObject) -> None:
    kept = torch.tensor(sorted(first))
    then = data.draw(st.sets(st.integers(0, len(first) - 1)))
    index = torch.tensor(sorted(then), dtype=torch.int64)
    values = torch.arange(100, 120)
    assert torch.equal(values[compose({"g": kept}, {"g": index})["g"]], values[kept][index])
