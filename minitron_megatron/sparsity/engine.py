"""Solves a network layer by layer: for every matrix, new weights that change the layer's outputs least.

Per layer every rank runs its own samples and sums the second moments of the inputs of each matrix; the sums are added
up; the rows of the matrices, which are independent, are shared out; and rank 0 writes the layer. With `sequential` the
next layer gets its inputs from the new weights, and makes up for their errors.

Results are equal to the bit for any number of ranks: micro-batches, sums (see `moment_sums`) and blocks of rows are the
same however they are spread, as long as every rank computes with the same number of threads.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.model.axes import Param
from minitron_megatron.parallel.collectives import rank0_first, sum_over
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.progress import progress
from minitron_megatron.sparsity.layer_stream import LayerStream, OneLayer
from minitron_megatron.sparsity.moment_sums import MomentSums
from minitron_megatron.sparsity.second_moments import SecondMoments
from minitron_megatron.sparsity.solved_layers import SolvedLayers, key_of

logger = logging.getLogger(__name__)

ROW_BLOCK = 512
"""Rows that are solved together. The same for any number of ranks, so that results are."""

WEIGHT = ""
Rows = Mapping[str, Tensor]
"""Some rows of a matrix under `WEIGHT`, and of its companions under their suffix."""

Solver = Callable[[Param, Tensor, SecondMoments | None], Callable[[slice], Rows]]
"""Prepares a matrix of the whole network, given its weights `[rows, columns]` and the second moments of its inputs, and
returns what solves some of its rows."""


@dataclass(frozen=True)
class Calibration:
    """How the inputs of matrices are measured.

    Attributes:
        num_batches: micro-batches over all ranks.
        sequential: inputs are those after the layers before are solved; else those of the dense network.
        most_norms: see `MomentSums`.
        damping: see `SecondMoments`.
    """

    num_batches: int
    sequential: bool
    most_norms: float | None
    damping: float


def solve_layers(
    solved: SolvedLayers,
    stream: LayerStream | None,
    calibration: Calibration,
    solver: Solver,
    chosen: Sequence[Param],
    ctx: ParallelContext,
    title: str,
) -> None:
    """Solves all layers that are not solved yet. Collective.

    Args:
        solved: where solved layers go.
        stream: the calibration set; None if no inputs are needed.
        calibration: how inputs are measured.
        solver: of a matrix.
        chosen: matrices to solve.
        ctx: this rank's place.
        title: of the progress bar.
    """
    count, first = len(solved.network.layers), rank0_first(solved.num_solved)
    if first:
        logger.info("going on after %d of %d layers", first, count)
    with progress(title, count) as advance:
        for number in range(count):
            if number < first:
                if stream is not None:
                    stream.run(stream.load(number), advance=True)
                advance(1)
                continue
            report = _solve_layer(number, solved, stream, calibration, solver, chosen, ctx)
            worst = max((own["error"] for own in report.values() if own.get("error") is not None), default=None)
            advance(1, "" if worst is None else f"largest error {worst:.3f}")


def _solve_layer(
    number: int,
    solved: SolvedLayers,
    stream: LayerStream | None,
    calibration: Calibration,
    solver: Solver,
    chosen: Sequence[Param],
    ctx: ParallelContext,
) -> dict[str, dict[str, Any]]:
    """Solves one layer, and returns its report: the relative error of every matrix, by name."""
    one = OneLayer(solved, number)
    params = [param for param in chosen if param.layer == number]
    moments: dict[str, SecondMoments] = {}
    if stream is not None:
        model = stream.load(number)
        sums = {own.name: _sums(own, calibration, ctx) for own in params}

        def take(param: Param, x: Tensor) -> None:
            if param.name in sums:
                sums[param.name].add(x)

        with stream.inputs(model, one.network, take):
            stream.run(model, advance=not calibration.sequential)
        for own in params:
            moments[own.name] = SecondMoments(sums.pop(own.name).total(), calibration.damping, _describe(own))
    tensors, report = _solve_matrices(params, solved, moments, solver, ctx)
    rank0_first(lambda: solved.write(number, tensors, report))
    if stream is not None and calibration.sequential:
        stream.run(stream.load(number), advance=True)
    return report


def _sums(param: Param, calibration: Calibration, ctx: ParallelContext) -> MomentSums:
    return MomentSums(param.shape[1], calibration.num_batches, ctx.device, ctx.collection.dp, calibration.most_norms)


def _solve_matrices(
    params: Sequence[Param],
    solved: SolvedLayers,
    moments: Mapping[str, SecondMoments],
    solver: Solver,
    ctx: ParallelContext,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Solves matrices, their rows shared out over the ranks.

    Returns:
        whole tensors by `key_of`, on rank 0; and, on all ranks, the report by name of the matrix.
    """
    rank, size = ctx.data_rank, ctx.layout.replicas
    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, Any]] = {}
    shares = _shares(params, size)
    for param in params:
        own = moments.get(param.name)
        blocks = [(block, owner) for other, block, owner in shares if other is param]
        weight = _read(solved, param).to(ctx.device)
        errors = torch.zeros(len(blocks), 2, dtype=torch.float64, device=ctx.device)
        solve = None
        parts: dict[str, list[Tensor]] = {}
        for index, (block, owner) in enumerate(blocks):
            rows: Rows = {}
            if owner == rank:
                solve = solve or solver(param, weight, own)
                rows = {**(made := solve(block)), WEIGHT: made[WEIGHT].to(solved.dtype)}
                if own is not None:
                    change = rows[WEIGHT].float() - weight[block]
                    errors[index] = torch.stack([own.error(change), own.error(weight[block])])
            for suffix, value in _to_rank0(rows, owner, ctx).items():
                parts.setdefault(suffix, []).append(value)
        sum_over(errors, ctx.collection.dp)
        change, whole = errors.sum(0).tolist()
        report[param.name] = {"error": change / whole if whole else None}
        for suffix, values in parts.items():
            tensors[f"{key_of(param)}{suffix}"] = torch.cat(values)
    return tensors, report


def _shares(params: Sequence[Param], size: int) -> list[tuple[Param, slice, int]]:
    """Shares blocks of rows out over ranks: runs of blocks of about equal work, so that few ranks prepare a matrix."""
    blocks = [
        (param, slice(start, min(start + ROW_BLOCK, param.shape[0])))
        for param in params
        for start in range(0, param.shape[0], ROW_BLOCK)
    ]
    work = np.cumsum([0, *((rows.stop - rows.start) * param.shape[1] ** 2 for param, rows in blocks)])
    middles = (work[:-1] + work[1:]) / 2
    owners = (middles * size / max(1, work[-1])).astype(int)
    return [(param, rows, int(owner)) for (param, rows), owner in zip(blocks, owners, strict=True)]


def _to_rank0(rows: Rows, owner: int, ctx: ParallelContext) -> Rows:
    """Returns the tensors of the owner, on the CPU of rank 0; nothing elsewhere. Collective for owner and rank 0."""
    rank, group = ctx.data_rank, ctx.collection.dp
    if owner != 0 and rank in (0, owner):
        described = [{suffix: (value.shape, value.dtype) for suffix, value in rows.items()}]
        source, target = dist.get_global_rank(group, owner), dist.get_global_rank(group, 0)
        if rank == owner:
            dist.send_object_list(described, dst=target, group=group)
            for value in rows.values():
                dist.send(value.contiguous().view(torch.uint8), dst=target, group=group)
            return {}
        dist.recv_object_list(described, src=source, group=group)
        received = {}
        for suffix, (shape, dtype) in described[0].items():
            received[suffix] = torch.empty(shape, dtype=dtype, device=ctx.device)
            dist.recv(received[suffix].view(torch.uint8), src=source, group=group)
        rows = received
    return {suffix: value.cpu() for suffix, value in rows.items()} if rank == 0 else {}


def _read(solved: SolvedLayers, param: Param) -> Tensor:
    """Returns a whole matrix of the source in float32."""
    return solved.source.read(param, [np.arange(size) for size in param.shape]).float()


def _describe(param: Param) -> str:
    return f"layer {param.layer}, {param.name}"
