"""The table of a recipe's models: size, held-out loss, speed, and how much of the loss of pruning is recovered."""

from rich.table import Table
from rich.text import Text

from minitron_megatron.report.results import Evaluation, recoveries

COLUMNS = ["model", "parameters", "without embeddings", "held-out loss", "perplexity", "tokens/s", "gap closed"]


def cells(evaluations: list[Evaluation]) -> list[list[str]]:
    """Returns a row of text for each model, in the order of `COLUMNS`. A dash means not measured."""
    return [
        [
            e.name,
            f"{e.parameters:,}",
            f"{e.parameters_without_embeddings:,}",
            f"{e.loss:.4f}",
            f"{e.perplexity:,.2f}",
            f"{e.generation['tokens_per_s']:,.1f}" if e.generation else "–",
            "–" if recovery is None else f"{recovery:.1%}",
        ]
        for e, recovery in zip(evaluations, recoveries(evaluations), strict=True)
    ]


def summary_table(evaluations: list[Evaluation]) -> Table:
    """Returns the table for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    rows = cells(evaluations)
    for column, values in zip(COLUMNS, zip(*rows, strict=True) if rows else [()] * len(COLUMNS), strict=True):
        # On a narrow terminal the headers wrap, and the numbers stay whole.
        width = max(map(len, values), default=0)
        table.add_column(column, justify="left" if column == "model" else "right", min_width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
