"""Tables of networks for a terminal: sizes and costs side by side, unequal layers, and differences."""

from itertools import zip_longest

from rich.console import Group
from rich.table import Table
from rich.text import Text

from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.checkpoint.sparsity_facts import MatrixFacts
from minitron_megatron.model.count import cache_bytes_per_token, forward_flops_per_token
from minitron_megatron.model.facts import network_facts
from minitron_megatron.model.layers import Slot, Sublayer
from minitron_megatron.model.network import Network
from minitron_megatron.plotting import short
from minitron_megatron.pruning.ranges import to_ranges
from minitron_megatron.report.differences import comparable, differences

_BF16_BYTES = 2
_NONE = "–"


def fact_table(facts: dict[str, str]) -> Table:
    """Returns a table of names and values."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(value))
    return table


def network_table(networks: dict[str, Network], sequence_length: int | None) -> Table:
    """Returns a table of sizes, counts, costs and switches, a column for each network.

    Args:
        networks: by role.
        sequence_length: tokens to count FLOPs for; None for the maximum of each network.
    """
    table = Table(box=None, show_header=len(networks) > 1, pad_edge=False)
    table.add_column()
    for name in networks:
        table.add_column(name, justify="right")
    columns = [_facts(network, sequence_length or network.max_positions) for network in networks.values()]
    for name in _merged(columns):
        table.add_row(Text(name, style="dim"), *(Text(column.get(name, _NONE)) for column in columns))
    return table


def layer_table(network: Network) -> Table:
    """Returns a row for each transformer layer: its size along every axis, and which sublayers it lacks."""
    axes = [(kind, axis) for kind in network.kinds for axis in kind.prunable]
    titles = {slot: " or ".join(kind.title for kind in network.kinds if kind.slot is slot) for slot in Slot}
    table = Table(box=None, pad_edge=False)
    for header in ("layer", *(axis.setting for _, axis in axes)):
        table.add_column(header, justify="right")
    table.add_column("missing")
    for number, positions in enumerate(network.layers):
        own: dict[type[Sublayer], Sublayer] = {type(s): s for s in (network.sublayers[p] for p in positions)}
        sizes = [f"{own[kind].total(axis):,}" if kind in own else _NONE for kind, axis in axes]
        filled = [kind.slot for kind in own]
        missing = [title for slot, title in titles.items() if title and slot not in filled]
        table.add_row(str(number), *sizes, ", ".join(missing))
    return table


def sparsity_table(matrices: list[MatrixFacts]) -> Table:
    """Returns a row for each transformer layer: share of zeros, broken groups and relative error of its matrices."""
    names = list(dict.fromkeys(own.param.name for own in matrices))
    short_names = [name.removesuffix(".weight").rpartition(".")[2] for name in names]
    table = Table(box=None, pad_edge=False)
    for header in ("layer", *(f"{name} {what}" for name in short_names for what in ("zeros", "error")), "broken"):
        table.add_column(header, justify="right")
    for number in sorted({own.param.layer for own in matrices if own.param.layer is not None}):
        of_layer = {own.param.name: own for own in matrices if own.param.layer == number}
        cells = []
        for name in names:
            own = of_layer.get(name)
            cells.append(_NONE if own is None or own.density is None else f"{100 * (1 - own.density):.1f}%")
            cells.append(_NONE if own is None or own.error is None else f"{own.error:.4f}")
        broken = [own.broken for own in of_layer.values() if own.broken is not None]
        table.add_row(str(number), *cells, f"{sum(broken):,}" if broken else _NONE)
    return table


def comparison(first: TensorSource, second: TensorSource) -> Group:
    """Compares two networks: sizes and switches and, if all sizes are equal, weights."""
    parts: list[Table | Text] = []
    facts = _differing_facts(first.network, second.network)
    if facts.row_count:
        parts.append(facts)
    if comparable(first, second):
        parts.append(_weights(first, second))
    elif not first.network.has_equal_layers or not second.network.has_equal_layers:
        parts.append(Text(f"layers that differ: {to_ranges(_differing_layers(first.network, second.network))}"))
    return Group(*parts)


def _differing_facts(first: Network, second: Network) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("", "this", "other", "other / this"):
        table.add_column(header, justify="right" if header else "left")
    columns = [_facts(network, first.max_positions) for network in (first, second)]
    for name in _merged(columns):
        this, other = (column.get(name, _NONE) for column in columns)
        if this != other:
            table.add_row(Text(name, style="dim"), Text(this), Text(other), _share(this, other))
    return table


def _differing_layers(first: Network, second: Network) -> list[int]:
    """Returns the numbers of the layers that differ, or that only one of two networks has."""
    layers = [
        [tuple(network.sublayers[position] for position in layer) for layer in network.layers]
        for network in (first, second)
    ]
    return [number for number, (one, other) in enumerate(zip_longest(*layers)) if one != other]


def _weights(first: TensorSource, second: TensorSource) -> Table | Text:
    """Returns the largest difference of each tensor."""
    tensors = differences(first, second)
    if not any(difference.num_layers for difference in tensors):
        return Text("all tensors are equal")
    table = Table(box=None, pad_edge=False)
    for header in ("tensor", "largest difference", "in layer", "layers that differ"):
        table.add_column(header, justify="left" if header == "tensor" else "right")
    for difference in tensors:
        layer = "" if difference.layer is None else str(difference.layer)
        count = "" if difference.layer is None else str(difference.num_layers)
        table.add_row(difference.name, f"{difference.largest:.3g}" if difference.num_layers else "none", layer, count)
    return table


def _facts(network: Network, sequence_length: int) -> dict[str, str]:
    """Returns sizes first, then costs, then switches."""
    costs = {
        f"forward FLOPs per token of {sequence_length}": short(forward_flops_per_token(network, sequence_length)),
        "bytes of KV cache per token in bf16": f"{cache_bytes_per_token(network, _BF16_BYTES):,}",
    }
    return {**network_facts(network), **costs, **network_facts(network, switches=True)}


def _merged(columns: list[dict[str, str]]) -> list[str]:
    """Merges the names of all columns, in an order that fits each of them."""
    names: list[str] = []
    for column in columns:
        place = 0
        for name in column:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    return names


def _share(before: str, after: str) -> str:
    """Returns the kept share of a count, in percent; an empty string for what is not a count."""
    before, after = before.replace(",", ""), after.replace(",", "")
    return f"{100 * int(after) / int(before):.1f}%" if before.isdigit() and after.isdigit() and int(before) else ""
