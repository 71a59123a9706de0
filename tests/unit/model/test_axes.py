"""The index algebra on `arange` weights, where a wrong row shows as a wrong number."""

import itertools

import numpy as np
import pytest

from minitron_megatron.model.axes import HIDDEN, Axis
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.layers.attention import GROUP, HEAD, HEAD_DIM, KEY, VALUE
from minitron_megatron.model.layers.mlp import FFN, GATE, UP
from minitron_megatron.model.parameters import parameters
from tests.tiny import NEMOTRON, changed
from tests.unit.model.configs import CONFIGS

GROUPS, HEADS, DIM, FFN_SIZE = 3, 4, 5, 7
SIZES = {"group": GROUPS, "head": HEADS, "head_dim": DIM, "ffn": FFN_SIZE, "hidden": 6}
SIZES |= dict.fromkeys(("key_head", "value_head", "gate", "up"), 1)
QKV = GROUP * (HEAD + KEY + VALUE) * HEAD_DIM
NOTHING = np.empty(0, dtype=np.int64)


def qkv_rows(heads_of_group, others=("key_head", "value_head")):
    """Rows of the fused projection, counted one by one in the order of Megatron's `linear_qkv`."""
    rows, number = [], itertools.count()
    for group in range(GROUPS):
        for member in [*range(HEADS), "key_head", "value_head"]:
            numbers = [next(number) for _ in range(DIM)]
            if group in heads_of_group and member in [*heads_of_group[group], *others]:
                rows += numbers
    return rows


def test_qkv_rows_are_counted_group_by_group_heads_then_key_then_value():
    everything = {group: range(HEADS) for group in range(GROUPS)}
    assert QKV.size(SIZES) == GROUPS * (HEADS + 2) * DIM
    assert QKV.index({}, SIZES).tolist() == qkv_rows(everything)
    without_key = QKV.index({"key_head": NOTHING}, SIZES)
    assert without_key.tolist() == qkv_rows(everything, others=["value_head"])
    heads_alone = QKV.index({"key_head": NOTHING, "value_head": NOTHING}, SIZES)
    assert heads_alone.tolist() == qkv_rows(everything, others=[])


def test_every_group_keeps_its_own_heads():
    heads = np.array([[0, 3], [1, 2], [2, 3]])
    kept = dict(enumerate(heads))
    assert QKV.index({"head": heads}, SIZES).tolist() == qkv_rows(kept)
    # Columns of the output projection: the same heads, without keys and values between them.
    columns = (GROUP * HEAD * HEAD_DIM).index({"head": heads}, SIZES)
    numbered = np.arange(GROUPS * HEADS * DIM).reshape(GROUPS, HEADS, DIM)
    assert columns.tolist() == np.concatenate([numbered[g][heads[g]].ravel() for g in range(GROUPS)]).tolist()


def test_kept_heads_belong_to_the_groups_that_are_kept():
    """Row i of a two-dimensional entry is for the i-th kept group, not for group i."""
    heads = np.array([[0, 1], [2, 3]])
    found = QKV.index({"group": np.array([0, 2]), "head": heads}, SIZES)
    assert found.tolist() == qkv_rows({0: heads[0], 2: heads[1]})


def test_heads_are_those_of_their_group_whatever_stands_outside_of_the_groups():
    """Row i of a two-dimensional entry is for the i-th kept group, and not for the i-th of an axis around it."""
    outer, heads = Axis("outer"), np.array([[0, 3], [1, 2]])
    dim, sizes = outer * GROUP * HEAD, {**SIZES, "outer": 2}
    numbered = np.arange(2 * GROUPS * HEADS).reshape(2, GROUPS, HEADS)
    expected = [numbered[o, g, heads[i]] for o in range(2) for i, g in enumerate([0, 2])]
    found = dim.index({"group": np.array([0, 2]), "head": heads}, sizes)
    assert found.tolist() == np.concatenate(expected).tolist()
    # Two projections side by side of the same rows of groups, as a fused input projection has them.
    double = (KEY + VALUE) * (GROUP * HEAD)
    found = double.index({"group": np.array([0, 2]), "head": heads}, SIZES)
    single = (GROUP * HEAD).index({"group": np.array([0, 2]), "head": heads}, SIZES)
    assert found.tolist() == [*single, *(single + GROUPS * HEADS)]


def test_a_range_of_groups_is_what_a_tensor_rank_holds():
    found = QKV.index({"group": np.arange(1, 3)}, SIZES)
    per_group = (HEADS + 2) * DIM
    assert found.tolist() == list(range(per_group, 3 * per_group))


def test_gate_and_up_of_the_same_neuron_stay_together():
    rows = (GATE + UP) * FFN
    kept = np.array([1, 4, 6])
    assert rows.index({"ffn": kept}, SIZES).tolist() == [1, 4, 6, 7 + 1, 7 + 4, 7 + 6]
    assert rows.index({"gate": NOTHING, "ffn": kept}, SIZES).tolist() == [7 + 1, 7 + 4, 7 + 6]
    assert HIDDEN.index({"ffn": kept}, SIZES).tolist() == list(range(6))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_parts_of_a_parameter_cover_its_rows_exactly_once(config):
    network = network_from_config(config)
    names = []
    for param in parameters(network):
        rows = np.concatenate([param.dims[0].index(part.kept, param.sizes) for part in param.parts])
        assert sorted(rows) == list(range(param.shape[0])), param.name
        names += [param.hf_name(part) for part in param.parts]
    assert len(set(names)) == len(names)


def test_kept_indices_along_all_axes_give_the_sizes_of_the_smaller_network():
    network = network_from_config(NEMOTRON)
    smaller = changed(network, hidden_size=40, ffn_hidden_size=30, num_heads=4)
    kept = {"hidden": np.arange(8, 48), "ffn": np.arange(0, 30), "head": np.array([[0, 2], [1, 2]])}
    for before, after in zip(parameters(network), parameters(smaller), strict=True):
        assert tuple(map(len, before.index(kept))) == after.shape, before.name
