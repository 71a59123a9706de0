"""Prints what a plan would do."""

from statistics import fmean

from rich.console import Console
from rich.table import Table

from minitron_megatron.model.count import cache_bytes_per_token, forward_flops_per_token, num_parameters
from minitron_megatron.model.network import Network
from minitron_megatron.pruning.kept_shares import kept_hidden_share, kept_share, kept_sublayers
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.ranges import to_ranges
from minitron_megatron.pruning.scores import Scores, scored_axes

_MAX_SEQUENCE = 4096
_NUMBER_BYTES = 2  # of bf16


def show_plan(plan: Plan, scores: Scores | None = None) -> None:
    """Prints sizes and counts before and after, what is dropped, and the share of the scores that each layer keeps.

    Args:
        plan: to show.
        scores: of its network, if known.
    """
    console = Console()
    source = plan.source
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "before", "after", "kept"):
        table.add_column(column, justify="left" if not column else "right")
    before, after = _sizes(source), _sizes(plan.target)
    for name in before:
        old, new = before[name], after.get(name, [0])
        table.add_row(name, _range(old), _range(new), f"{fmean(new) / fmean(old):.1%}" if sum(old) else "")
    console.print(table)
    for kind in source.kinds:
        gone = [source.layer_of(p) for p in source.positions(kind) if p not in plan.sublayers]
        if gone:
            console.print(f"dropped {kind.title} sublayers: {to_ranges(gone)}")
    if scores is not None:
        console.print(f"hidden channels kept hold {kept_hidden_share(plan, scores):.1%} of all scores")
        console.print(_shares(plan, scores))


def _shares(plan: Plan, scores: Scores) -> Table:
    """Returns the share of every axis' scores that each layer keeps."""
    source, columns = plan.source, {}
    for kind, axis in scored_axes(source):
        stays, shares = kept_sublayers(plan, kind), kept_share(plan, scores, kind, axis)
        cells = [f"{share:.1%}" if here else "dropped" for share, here in zip(shares, stays, strict=True)]
        layers = [source.layer_of(position) for position in source.positions(kind)]
        columns[f"{axis.elements}s: share of scores"] = dict(zip(layers, cells, strict=True))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("layer", *columns):
        table.add_column(column, justify="right")
    for layer in range(len(source.layers)):
        table.add_row(str(layer), *(cells.get(layer, "") for cells in columns.values()))
    return table


def _range(values: list[int]) -> str:
    """Formats one number if all are equal, else the smallest and the largest."""
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def _sizes(network: Network) -> dict[str, list[int]]:
    """Returns everything that can shrink by its name, with a size for each layer that has it."""
    sequence = min(network.max_positions, _MAX_SEQUENCE)
    sizes = {f"{kind.title} sublayers": [len(network.positions(kind))] for kind in network.kinds}
    sizes["hidden"] = [network.hidden_size]
    for kind in network.kinds:
        for axis in kind.prunable:
            own = [network.sublayers[position].total(axis) for position in network.positions(kind)]
            sizes[f"{axis.elements}s"] = own
    sizes["parameters"] = [num_parameters(network)]
    sizes["parameters without embeddings"] = [num_parameters(network, embeddings=False)]
    sizes[f"forward FLOPs per token at {sequence} tokens"] = [round(forward_flops_per_token(network, sequence))]
    sizes["bytes of KV cache per token in bf16"] = [cache_bytes_per_token(network, _NUMBER_BYTES)]
    return sizes
