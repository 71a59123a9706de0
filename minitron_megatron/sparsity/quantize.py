"""The verb `quantize`: rounds a checkpoint's weights to few bits, and makes up for the error."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.checkpoint.companions import MASK, SCALE, mask_of, pack_mask, read_mask, scale_of
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.quantize import QuantizeConfig
from minitron_megatron.config.sparsify import UNSTRUCTURED
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.model.axes import Param
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import cache_scales, layer_key
from minitron_megatron.sparsity.engine import WEIGHT, Rows
from minitron_megatron.sparsity.grids import grids_of, scale_dtype
from minitron_megatron.sparsity.layerwise import Task, chosen_matrices, run_layerwise
from minitron_megatron.sparsity.methods import Matrix, gptq
from minitron_megatron.sparsity.second_moments import SecondMoments


@sole_writer
def quantize(config: QuantizeConfig) -> Path:
    """Quantises a checkpoint, one layer at a time; zeros of a sparse one stay.

    An interrupted run goes on after the last finished layer when it is started again with the same settings.

    Returns:
        folder of the quantised checkpoint: rounded weights in the source's number format, and their scales, and with
        `kv_cache` those of the keys and values of each layer.

    Raises:
        CheckpointError: the checkpoint is not whole, or is quantised already.
        ConfigError: a group size does not divide, `kv_cache` is set for a network that caches something else, or the
            output holds something else.
        DataError: the text is shorter than one sequence.
    """
    checkpoint = Checkpoint(config.checkpoint)
    return run_layerwise(config, checkpoint, lambda: quantization(config, checkpoint))


def quantization(config: QuantizeConfig, checkpoint: Checkpoint) -> Task:
    """Returns what to do to a checkpoint.

    Raises:
        CheckpointError: it is quantised already.
        ConfigError: a group size does not divide, or `kv_cache` is set for a network that caches something else.
    """
    if checkpoint.scales:
        raise CheckpointError(
            f"{checkpoint.root} is quantised already: name the checkpoint that it was made of, whose weights are whole"
        )
    chosen = chosen_matrices(checkpoint, config.ignore)
    raise_if_any(_cache_problems(config, checkpoint.network))
    grids = grids_of(chosen, config.scheme, config.group_size)
    dtype = scale_dtype(checkpoint)

    def solver(param: Param, weight: Tensor, moments: SecondMoments | None) -> Callable[[slice], Rows]:
        grid, mask = grids[param], None
        if layer_key(mask_of(param)) in checkpoint.companions:
            mask = read_mask(checkpoint, param, [np.arange(size) for size in param.shape]).to(weight.device)
        rounded = gptq(Matrix(weight, moments, config.by_activation), grid, dtype) if moments else None

        def solve(rows: slice) -> Rows:
            own = weight[rows]
            if rounded:
                new, scales = rounded(own, None if mask is None else mask[rows])
            else:
                scales = grid.scales(own, dtype)
                new = grid.round(own, grid.spread(scales))
            beside = {MASK: pack_mask(mask[rows])} if mask is not None else {}
            return {WEIGHT: new, SCALE: scales, **beside}

        return solve

    masks = [mask_of(param) for param in chosen if layer_key(mask_of(param)) in checkpoint.companions]
    scales = [scale_of(param, grid.group) for param, grid in grids.items()]
    cached = cache_scales(checkpoint.network) if config.kv_cache else ()
    details = {"scheme": config.scheme.value, "method": config.method.value}
    if config.kv_cache:
        details["kv_cache"] = config.kv_cache.value
    if checkpoint.masks:
        details["pattern"] = checkpoint.manifest.details.get("pattern", UNSTRUCTURED)
    words = [config.method.value, config.scheme.value, *["KV cache"] * (config.kv_cache is not None)]
    title = f"quantize ({', '.join(words)})"
    return Task("quantize", title, chosen, solver, [*masks, *scales], cached, details)


def _cache_problems(config: QuantizeConfig, network: Network) -> list[str]:
    """Returns why what a network caches in generation has no scales, in one sentence."""
    if config.kv_cache is None:
        return []
    where = f"kv_cache = {config.kv_cache.value}"
    others = [
        network.describe(positions[0])
        for sublayer, positions in network.alike()
        if sublayer.cache_bytes_per_token(1) and not sublayer.cached
    ]
    if others:
        return [f"{where}: {others[0]} caches something that cannot have one scale for a layer: set it to null"]
    return [] if cache_scales(network) else [f"{where}: the network caches nothing per token: set it to null"]
