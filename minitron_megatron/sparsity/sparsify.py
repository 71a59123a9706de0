"""The verb `sparsify`: sets a share of a checkpoint's weights to zero, and makes up for it."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.artifacts.manifest import Parent
from minitron_megatron.checkpoint.companions import (
    MASK,
    SCALE,
    mask_of,
    matrices,
    norm_of,
    pack_mask,
    read_mask,
    scale_of,
)
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.sparsify import UNSTRUCTURED, SparsifyConfig, SparsifyMethod
from minitron_megatron.data.samples import Samples, rank_batches
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.model.axes import Param
from minitron_megatron.model.parameters import layer_key
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.sparsity.allocation import SAMPLES, allocate, layer_costs
from minitron_megatron.sparsity.engine import WEIGHT, Rows, Solver
from minitron_megatron.sparsity.grids import Grid, grids_of, scale_dtype
from minitron_megatron.sparsity.layer_stream import LayerStream
from minitron_megatron.sparsity.layerwise import Task, chosen_matrices, matches, run_layerwise, unmatched
from minitron_megatron.sparsity.methods import METHODS, Matrix, SparseRows, gptq, sparsegpt_rounded
from minitron_megatron.sparsity.patterns import NofM, Pattern, Unstructured
from minitron_megatron.sparsity.refit import refit
from minitron_megatron.sparsity.second_moments import SecondMoments

logger = logging.getLogger(__name__)


@sole_writer
def sparsify(config: SparsifyConfig) -> Path:
    """Sparsifies a checkpoint, one layer at a time.

    An interrupted run goes on after the last finished layer when it is started again with the same settings.

    Returns:
        folder of the sparse checkpoint, which carries its masks.

    Raises:
        CheckpointError: the checkpoint is not whole.
        ConfigError: a matrix cannot have the pattern, or the output holds something else.
        DataError: the text is shorter than one sequence.
    """
    checkpoint = Checkpoint(config.checkpoint)
    if checkpoint.scales:
        raise CheckpointError(f"{checkpoint.root} is quantised: sparsify what it was made of, and quantise the result")
    return run_layerwise(config, checkpoint, lambda: sparsification(config, checkpoint))


def sparsification(config: SparsifyConfig, checkpoint: Checkpoint) -> Task:
    """Returns what to do to a checkpoint.

    Raises:
        ConfigError: a matrix cannot have the pattern.
    """
    pattern = pattern_of(config)
    chosen = chosen_matrices(checkpoint, config.ignore)
    if config.masks_of is None:
        raise_if_any(_pattern_problems(chosen, pattern))
    raise_if_any(unmatched(chosen, config.sparsity_of, "sparsity_of"))
    patterns = {param: _pattern_for(param, config) for param in chosen}
    grids = grids_of(chosen, config.scheme, config.group_size) if config.scheme else {}
    solver = _solver(config, patterns, grids, _masks_of(config, chosen), scale_dtype(checkpoint))
    beside = [mask_of(param) for param in chosen] + [scale_of(param, grid.group) for param, grid in grids.items()]
    beside += [norm_of(param) for param in chosen] if config.needs_inputs else []
    details = _details(config, patterns)

    def allocate_zeros(samples: Samples, ctx: ParallelContext) -> None:
        shares = _shares_by_error(config, checkpoint, chosen, samples, ctx)
        patterns.update({param: Unstructured(shares[param.layer]) for param in chosen if param.layer is not None})
        details["sparsity_of_layers"] = shares

    title = f"sparsify ({details['method']}, {details['pattern']})"
    parents = [Parent.of("masks_of", Path(config.masks_of))] if config.masks_of else []
    prepare = allocate_zeros if config.by_error else None
    return Task("sparsify", title, chosen, solver, beside, details=details, parents=parents, prepare=prepare)


def _solver(
    config: SparsifyConfig,
    patterns: Mapping[Param, Pattern],
    grids: Mapping[Param, Grid],
    given: Callable[[Param, Tensor], SparseRows],
    dtype: torch.dtype,
) -> Solver:
    """Returns what solves a matrix.

    Args:
        config: names the method.
        patterns: of every matrix; they are read when it is solved.
        grids: of matrices to round.
        given: puts given or random masks on a matrix.
        dtype: of scales.
    """
    in_one_pass = config.method is SparsifyMethod.SPARSEGPT and not config.refit

    def solver(param: Param, weight: Tensor, moments: SecondMoments | None) -> Callable[[slice], Rows]:
        moments = moments or SecondMoments(torch.eye(0), config.damping)  # of a method that asks for none
        matrix = Matrix(weight, moments, config.by_activation, param.rows_of_parts())
        grid, pattern = grids.get(param), patterns[param]
        if grid and in_one_pass:
            solve_both = sparsegpt_rounded(matrix, pattern, grid, dtype)

            def solve_in_one(rows: slice) -> Rows:
                new, mask, scales = solve_both(rows)
                return {WEIGHT: new, MASK: pack_mask(mask), SCALE: scales}

            return solve_in_one
        solve_rows = METHODS[config.method](matrix, pattern) if config.method in METHODS else given(param, weight)
        rounded = gptq(matrix, grid, dtype) if grid else None

        def solve(rows: slice) -> Rows:
            new, mask = solve_rows(rows)
            if config.refit:
                new = refit(weight[rows], mask, moments, config.refit_steps, start=new)
            made = {MASK: pack_mask(mask)}
            if rounded:
                new, made[SCALE] = rounded(new, mask)
            return {WEIGHT: new, **made}

        return solve

    return solver


def _shares_by_error(
    config: SparsifyConfig, checkpoint: Checkpoint, chosen: Sequence[Param], samples: Samples, ctx: ParallelContext
) -> dict[int, float]:
    """Returns the share of zeros of each layer that has matrices to sparsify. Collective."""
    batches = list(rank_batches(samples, 0, SAMPLES, 1, ctx.data_rank, ctx.layout.replicas))
    costs = layer_costs(LayerStream(checkpoint, batches, ctx, config.dtype), chosen, config.sparsity, ctx)
    sizes: dict[int, int] = {}
    for param in chosen:
        assert param.layer is not None
        sizes[param.layer] = sizes.get(param.layer, 0) + math.prod(param.shape)
    return allocate({layer: costs[layer].tolist() for layer in sizes}, sizes, config.sparsity)


def _masks_of(config: SparsifyConfig, chosen: Sequence[Param]) -> Callable[[Param, Tensor], SparseRows]:
    """Returns what puts the masks of another checkpoint, or random ones, on a matrix.

    Raises:
        CheckpointError: the other checkpoint is of another network, or has no mask of a chosen matrix.
    """
    other = Checkpoint(config.masks_of) if config.masks_of else None
    if other:
        shapes = {layer_key(param): param.shape for param in matrices(other.network)}
        missing = [
            layer_key(param)
            for param in chosen
            if layer_key(mask_of(param)) not in other.companions or shapes[layer_key(param)] != param.shape
        ]
        if missing:
            raise CheckpointError(
                f"masks_of = {config.masks_of} has no masks of the shape of {', '.join(missing[:4])}"
                f"{' and others' * (len(missing) > 4)}: name a sparse checkpoint of the same network"
            )

    def make(param: Param, weight: Tensor) -> SparseRows:
        digest = hashlib.sha256(f"{config.seed} {layer_key(param)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        if other is None:
            mask = _pattern_for(param, config).mask(torch.rand(weight.shape, generator=generator))
        else:
            mask = read_mask(other, param, [np.arange(size) for size in param.shape])
            if config.method is SparsifyMethod.RANDOM:
                mask = mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        mask = mask.to(weight.device)
        return lambda rows: (weight[rows] * mask[rows], mask[rows])

    return make


def _details(config: SparsifyConfig, patterns: Mapping[Param, Pattern]) -> dict[str, Any]:
    """Returns what the manifest says of the result."""
    zeros = sum(own.sparsity * math.prod(param.shape) for param, own in patterns.items())
    details: dict[str, Any] = {
        "pattern": str(pattern_of(config)),
        "sparsity": zeros / sum(math.prod(param.shape) for param in patterns),
        "method": config.method.value,
    }
    if config.masks_of:
        is_same = config.method is SparsifyMethod.GIVEN
        known = Checkpoint(config.masks_of).manifest.details
        details |= {"pattern": known.get("pattern", UNSTRUCTURED) if is_same else UNSTRUCTURED}
        details |= {"sparsity": known.get("sparsity")}
    if config.scheme:
        details["scheme"] = config.scheme.value
    return details


def pattern_of(config: SparsifyConfig) -> Pattern:
    """Returns the pattern of the settings."""
    return NofM(*config.n_of_m) if config.n_of_m else Unstructured(config.sparsity)


def _pattern_for(param: Param, config: SparsifyConfig) -> Pattern:
    """Returns the pattern of a matrix: that of all, or with a share of zeros of its own."""
    own = [share for glob, share in config.sparsity_of.items() if matches(param, glob)]
    return Unstructured(own[-1]) if own else pattern_of(config)


def _pattern_problems(chosen: Sequence[Param], pattern: Pattern) -> list[str]:
    """Returns which matrices cannot have a pattern, one sentence for each name."""
    wrong = {param.name: param.shape[1] for param in chosen if param.shape[1] % pattern.group}
    return [
        f"pattern = {pattern}: {name} has {columns} columns, which is no multiple of {pattern.group}: choose another "
        f"pattern, or leave it dense with ignore=[*.{name}]"
        for name, columns in wrong.items()
    ]
