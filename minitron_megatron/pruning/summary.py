"""What a plan would do, for people to read before it is done."""

from rich.console import Console
from rich.table import Table

from minitron_megatron.model.count import forward_flops_per_token, num_parameters
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.pruning.kept import kept_ffn_share, kept_head_share, kept_hidden_share
from minitron_megatron.pruning.plan import Plan, to_ranges
from minitron_megatron.pruning.scores import Scores

_MAX_SEQUENCE = 4096


def show_plan(plan: Plan, scores: Scores | None = None) -> None:
    """Print shape and counts before and after, what is dropped, and the share of the scores that stays per layer.

    Args:
        plan: what stays.
        scores: of the network, if there are any.
    """
    console = Console()
    source, target = plan.source, plan.target
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "before", "after", "kept"):
        table.add_column(column, justify="left" if not column else "right")
    for name, before, after in _sizes(source, target):
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.1%}")
    console.print(table)
    for kind, name in ((ATTENTION, "attention"), (MLP, "MLP")):
        gone = [i for i, p in enumerate(source.sublayers(kind)) if p not in plan.sublayers]
        if gone:
            console.print(f"dropped {name} sublayers: {to_ranges(gone)}")
    if scores is not None:
        console.print(f"hidden channels kept hold {kept_hidden_share(plan, scores):.1%} of all scores")
        shares = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("layer", "neurons: share of scores", "heads: share of scores"):
            shares.add_column(column, justify="right")
        columns = []
        for kind, kept in ((MLP, kept_ffn_share(plan, scores)), (ATTENTION, kept_head_share(plan, scores))):
            stays = [position in plan.sublayers for position in source.sublayers(kind)]
            columns.append([f"{s:.1%}" if here else "dropped" for s, here in zip(kept, stays, strict=True)])
        for layer, row in enumerate(zip(*columns, strict=True)):
            shares.add_row(str(layer), *row)
        console.print(shares)


def _sizes(source: ModelShape, target: ModelShape) -> list[tuple[str, int, int]]:
    """Name, number before and number after, of everything that can shrink."""
    sequence = min(source.max_positions, _MAX_SEQUENCE)
    numbers = {
        "attention sublayers": lambda s: len(s.sublayers(ATTENTION)),
        "MLP sublayers": lambda s: len(s.sublayers(MLP)),
        "hidden": lambda s: s.hidden,
        "ffn": lambda s: s.ffn,
        "query groups": lambda s: s.num_query_groups,
        "heads": lambda s: s.num_heads,
        "parameters": num_parameters,
        "parameters without embeddings": lambda s: num_parameters(s, embeddings=False),
        f"forward FLOPs per token at {sequence} tokens": lambda s: round(forward_flops_per_token(s, sequence)),
    }
    return [(name, number(source), number(target)) for name, number in numbers.items()]
