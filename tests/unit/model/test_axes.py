"""The index algebra on `arange` weights, where a wrong row shows as a wrong number."""

import itertools

import numpy as np
import pytest

from minitron_megatron.model.axes import (
    FFN,
    GATE,
    GROUP,
    HEAD,
    HEAD_DIM,
    HIDDEN,
    KEY,
    UP,
    VALUE,
    axis_sizes,
    parameters,
)
from minitron_megatron.model.families import shape_from_config
from tests.tiny import NEMOTRON
from tests.unit.model.configs import CONFIGS

GROUPS, HEADS, DIM, FFN_SIZE = 3, 4, 5, 7
SIZES = {"group": GROUPS, "head": HEADS, "head_dim": DIM, "ffn": FFN_SIZE, "hidden": 6}
SIZES |= dict.fromkeys(("key", "value", "gate", "up"), 1)
QKV = GROUP * (HEAD + KEY + VALUE) * HEAD_DIM
NOTHING = np.empty(0, dtype=np.int64)


def qkv_rows(heads_of_group, others=("key", "value")):
    """Rows of the fused projection, counted one by one in the order of Megatron's `linear_qkv`."""
    rows, number = [], itertools.count()
    for group in range(GROUPS):
        for member in [*range(HEADS), "key", "value"]:
            numbers = [next(number) for _ in range(DIM)]
            if group in heads_of_group and member in [*heads_of_group[group], *others]:
                rows += numbers
    return rows


def test_qkv_rows_are_counted_group_by_group_heads_then_key_then_value():
    everything = {group: range(HEADS) for group in range(GROUPS)}
    assert QKV.size(SIZES) == GROUPS * (HEADS + 2) * DIM
    assert QKV.index({}, SIZES).tolist() == qkv_rows(everything)
    without_key = QKV.index({"key": NOTHING}, SIZES)
    assert without_key.tolist() == qkv_rows(everything, others=["value"])
    heads_alone = QKV.index({"key": NOTHING, "value": NOTHING}, SIZES)
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
    shape = shape_from_config(config)
    sizes = axis_sizes(shape)
    names = []
    for param in parameters(shape):
        rows = np.concatenate([param.dims[0].index(part.kept, sizes) for part in param.parts])
        assert sorted(rows) == list(range(param.size(sizes)[0])), param.name
        names += [part.name for part in param.parts]
    assert len(set(names)) == len(names)


def test_kept_indices_along_all_axes_give_the_sizes_of_the_smaller_network():
    shape = shape_from_config(NEMOTRON)
    smaller = shape.replace(hidden=40, ffn=30, num_heads=4)
    kept = {"hidden": np.arange(8, 48), "ffn": np.arange(0, 30), "head": np.array([[0, 2], [1, 2]])}
    for before, after in zip(parameters(shape), parameters(smaller), strict=True):
        cut = tuple(len(index) for index in before.index(kept, axis_sizes(shape)))
        assert cut == after.size(axis_sizes(smaller)), before.name
