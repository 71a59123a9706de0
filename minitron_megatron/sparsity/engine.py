"""Solves a network layer by layer: for every matrix, new weights that change the layer's outputs least.

Per layer every rank runs its own samples and sums the second moments of the inputs of each matrix; the sums are added
up; the rows of the matrices, which are independent, are shared out; and rank 0 writes the layer. With `sequential` the
next layer gets its inputs from the new weights, and makes up for their errors. Where the second moments of all of a
layer's matrices are too large, it is run again for some after others, with its old weights until all are solved.

What a layer caches in generation is measured in the run whose outputs the next layer gets, which there is in any case:
with `sequential` that of the new weights, which will be served; else that of the old ones.

Results are equal to the bit for any number of ranks: micro-batches, sums (see `moment_sums`) and blocks of rows are the
same however they are spread, as long as every rank computes with the same number of threads.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.checkpoint.companions import NORM
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.errors import DataError
from minitron_megatron.model.axes import Param
from minitron_megatron.parallel.collectives import raise_on_all_ranks, rank0_first, sum_over
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.cpu import bypass_cpu_mode, give_back_freed_memory
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.progress import progress
from minitron_megatron.sparsity.cache_scales import CacheScale
from minitron_megatron.sparsity.layer_stream import LayerStream, OneLayer
from minitron_megatron.sparsity.moment_sums import MomentSums
from minitron_megatron.sparsity.second_moments import SecondMoments
from minitron_megatron.sparsity.solved_layers import SolvedLayers, key_of

logger = logging.getLogger(__name__)

ROW_BLOCK = 1024
"""Rows that are solved together. The same for any number of ranks, so that results are."""

WEIGHT = ""
Rows = Mapping[str, Tensor]
"""Some rows of a matrix under `WEIGHT`, and of its companions under their suffix."""

Solver = Callable[[Param, Tensor, SecondMoments | None], Callable[[slice], Rows]]
"""Prepares a matrix of the whole network, given its weights `[rows, columns]` and the second moments of its inputs, and
returns what solves some of its rows."""


@dataclass(frozen=True)
class Calibration:
    """What is measured over the calibration set, and how.

    Attributes:
        needs_inputs: the inputs of matrices are measured.
        cached: scales of what layers cache that are measured, see `cache_scales`.
        num_batches: micro-batches over all ranks.
        sequential: inputs are those after the layers before are solved; else those of the dense network.
        most_norms: see `MomentSums`.
        damping: see `SecondMoments`.
        max_bytes: of the sums of matrices that are measured in one run of their layer, which is run again for others.
    """

    needs_inputs: bool
    cached: Sequence[Param]
    num_batches: int
    sequential: bool
    most_norms: float | None
    damping: float
    max_bytes: float


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
        stream: the calibration set; None if nothing is measured.
        calibration: what is measured.
        solver: of a matrix.
        chosen: matrices to solve.
        ctx: this rank's place.
        title: of the progress bar.

    Raises:
        DataError: the inputs of a matrix, or what a layer caches, are not finite.
    """
    count, first = len(solved.network.layers), rank0_first(solved.count_files)
    if first:
        logger.info("going on after %d of %d layers", first, count)
    with progress(title, count) as advance, watchdog(ctx.timeout_min) as heartbeat:
        work = _LayerWork(solved, stream, calibration, solver, ctx, heartbeat)
        for number in range(count):
            if number < first:
                solved.num_solved = number + 1
                if stream is not None:
                    work.run(number, {}, advance=True)
                advance(1)
                continue
            report = work.solve(number, [param for param in chosen if param.layer == number])
            worst = max((own["error"] for own in report.values() if own["error"] is not None), default=None)
            advance(1, "" if worst is None else f"largest error {worst:.3f}")


@dataclass(frozen=True)
class _LayerWork:
    """Solves one layer after another; see `solve_layers`."""

    solved: SolvedLayers
    stream: LayerStream | None
    calibration: Calibration
    solver: Solver
    ctx: ParallelContext
    heartbeat: Callable[[], None]

    def solve(self, number: int, params: Sequence[Param]) -> dict[str, dict[str, Any]]:
        """Solves a layer's matrices, writes them, and returns the report: the relative error of each, by name."""
        tensors: dict[str, Tensor] = {}
        errors: dict[Param, float | None] = {}
        together = self._measured_together(params)
        for place, own in enumerate(together):
            moments = self._measure(number, own, is_last=place == len(together) - 1)
            tensors |= {f"{key_of(p)}{NORM}": moments[p.name].diagonal.sqrt().cpu() for p in own if p.name in moments}
            rows, changes = self._solve_own(own, moments)
            tensors |= self._collect(own, rows)
            sum_over(changes, self.ctx.collection.dp)
            errors |= {
                p: change / whole if whole else None for p, (change, whole) in zip(own, changes.tolist(), strict=True)
            }
        report = {param.name: {"error": errors[param]} for param in params}
        rank0_first(lambda: self.solved.write(number, tensors, report))
        self.solved.num_solved = number + 1
        if self.stream is not None and self.calibration.sequential:
            self.run(number, {}, advance=True)
        return report

    def _measured_together(self, params: Sequence[Param]) -> list[list[Param]]:
        """Splits a layer's matrices into those whose inputs are measured in one run of it, the widest first."""
        if not self.calibration.needs_inputs:
            return [list(params)]
        together: list[list[Param]] = [[]]
        size = 0.0
        for param in sorted(params, key=lambda each: -each.shape[1]):
            own = MomentSums.num_bytes(param.shape[1])
            if together[-1] and size + own > self.calibration.max_bytes:
                together.append([])
                size = 0
            together[-1].append(param)
            size += own
        return together

    def run(self, number: int, sums: Mapping[str, MomentSums], advance: bool) -> None:
        """Runs a layer, as the stream's source has it, over the calibration set.

        Args:
            number: of the layer.
            sums: get the inputs of the matrices with these names.
            advance: whether its outputs are the next layer's inputs; then what it caches is measured.
        """
        assert self.stream is not None
        model, network = self.stream.load(number), OneLayer(self.solved, number).network
        give_back_freed_memory()
        device, group = self.ctx.device, self.ctx.collection.dp
        cached = [param for param in self.calibration.cached if advance and param.layer == number]
        scales = {param.name: CacheScale(param, device, group) for param in cached}

        def take_inputs(param: Param, x: Tensor) -> None:
            if param.name in sums:
                sums[param.name].add(x)

        with ExitStack() as stack:
            if sums:
                stack.enter_context(self.stream.inputs(model, network, take_inputs))
            if scales:
                stack.enter_context(self.stream.cached(model, network, lambda scale, x: scales[scale.name].add(x)))
            self.stream.run(model, advance=advance, after_batch=self.heartbeat)
        self.solved.beside |= {key_of(param): scales[param.name].total() for param in cached}

    def _measure(self, number: int, params: Sequence[Param], is_last: bool) -> dict[str, SecondMoments]:
        """Returns the second moments of the inputs of these matrices of a layer, by name.

        Args:
            number: of the layer.
            params: some of its matrices.
            is_last: whether no others are measured after them.
        """
        how = self.calibration
        sums = {param.name: self._sums(param) for param in params if how.needs_inputs}
        advance = is_last and not how.sequential
        if self.stream is not None and (sums or advance):
            self.run(number, sums, advance=advance)
            self.stream.unload()
            give_back_freed_memory()
        moments = {}
        for param in params if sums else ():
            total, name = sums.pop(param.name).total(), f"layer {param.layer}, {param.name}"
            if not total.diagonal().isfinite().all():  # on every rank
                raise DataError(
                    f"the inputs of {name} are not finite: set dtype=bf16 or fp32, or look at data.text and the weights"
                )
            moments[param.name] = SecondMoments(total, how.damping, name)
        return moments

    def _sums(self, param: Param) -> MomentSums:
        how, group = self.calibration, self.ctx.collection.dp
        return MomentSums(param.shape[1], how.num_batches, self.ctx.device, group, how.most_norms)

    def _solve_own(
        self, params: Sequence[Param], moments: dict[str, SecondMoments]
    ) -> tuple[dict[tuple[str, int], Rows], Tensor]:
        """Solves this rank's rows. Takes each matrix's moments out of `moments`, so that they go when it is solved.

        Returns:
            them, by name of the matrix and first row; and for each matrix the squared changes of its outputs by these
            rows, and the squares of the outputs.
        """
        rows: dict[tuple[str, int], Rows] = {}
        errors = torch.zeros(len(params), 2, dtype=torch.float64, device=self.ctx.device)
        with raise_on_all_ranks(), bypass_cpu_mode():
            # The widest is the first, before there are rows beside its moments.
            for index, param in enumerate(params):
                own = moments.pop(param.name, None)
                blocks = [
                    block for other, block, owner in self._shares(params) if other is param and owner == self._rank
                ]
                if blocks:
                    solved, errors[index] = self._solve_blocks(param, own, blocks)
                    rows |= {(param.name, start): made for start, made in solved.items()}
        return rows, errors

    def _solve_blocks(
        self, param: Param, moments: SecondMoments | None, blocks: Sequence[slice]
    ) -> tuple[dict[int, Rows], Tensor]:
        """Solves blocks of rows of a matrix; see `_solve_own`."""
        rows: dict[int, Rows] = {}
        errors = torch.zeros(2, dtype=torch.float64, device=self.ctx.device)
        give_back_freed_memory()
        weight = _read(self.solved.source, param).to(self.ctx.device)
        solve = self.solver(param, weight, moments)
        for block in blocks:
            made = dict(solve(block))
            give_back_freed_memory()
            made[WEIGHT] = made[WEIGHT].to(self.solved.dtype)
            rows[block.start] = made
            if moments is not None:
                change = made[WEIGHT].float() - weight[block]
                errors += torch.stack([moments.error(change), moments.error(weight[block])])
            self.heartbeat()
        return rows, errors

    def _collect(self, params: Sequence[Param], rows: Mapping[tuple[str, int], Rows]) -> dict[str, Tensor]:
        """Returns the whole matrices of a layer and their companions, by `key_of`, on rank 0; nothing elsewhere."""
        parts: dict[str, list[Tensor]] = {}
        for param, block, owner in self._shares(params):
            own = rows.get((param.name, block.start), {})
            for suffix, value in _to_rank0(own, owner, self.ctx).items():
                parts.setdefault(f"{key_of(param)}{suffix}", []).append(value)
        return {key: torch.cat(values) for key, values in parts.items()}

    def _shares(self, params: Sequence[Param]) -> list[tuple[Param, slice, int]]:
        return _shares(params, self.ctx.layout.replicas)

    @property
    def _rank(self) -> int:
        return self.ctx.data_rank


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
            dist.send_object_list(described, dst=target, group=group, device=ctx.device)
            for value in rows.values():  # NCCL sends none from the CPU
                dist.send(value.to(ctx.device).contiguous().view(torch.uint8), dst=target, group=group)
            return {}
        dist.recv_object_list(described, src=source, group=group, device=ctx.device)
        received = {}
        for suffix, (shape, dtype) in described[0].items():
            received[suffix] = torch.empty(shape, dtype=dtype, device=ctx.device)
            dist.recv(received[suffix].view(torch.uint8), src=source, group=group)
        rows = received
    return {suffix: value.cpu() for suffix, value in rows.items()} if rank == 0 else {}


def _read(source: TensorSource, param: Param) -> Tensor:
    """Returns a whole matrix in float32."""
    return source.read(param, [np.arange(size) for size in param.shape]).float()
