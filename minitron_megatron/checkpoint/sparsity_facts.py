"""What the masks and scales of a checkpoint say: density and broken groups of every layer, and the error of each."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minitron_megatron.checkpoint.companions import matrices, read_mask
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.model.axes import Param

_ROWS = 4096  # read at once
# NVIDIA's sparse tensor cores take at most two of four.
_KEPT, _GROUP = 2, 4


@dataclass(frozen=True)
class MatrixFacts:
    """What is known of a sparse or quantised matrix.

    Attributes:
        param: the matrix.
        density: share of weights that its mask keeps; None without a mask.
        broken: groups of four columns of which the mask keeps more than two; None without a mask, or where the columns
            are no multiple of four.
        group: columns that share a scale; None without scales.
        error: squared change of its outputs when it was made, as a share of theirs; None if not known.
    """

    param: Param
    density: float | None
    broken: int | None
    group: int | None
    error: float | None


def sparsity_facts(checkpoint: Checkpoint) -> Iterator[MatrixFacts]:
    """Yields what is known of every matrix that has a mask or scales."""
    has_manifest = (checkpoint.root / "manifest.json").is_file()
    errors = checkpoint.manifest.details.get("errors", []) if has_manifest else []
    masks = {(mask.position, mask.name.removesuffix("_mask")) for mask in checkpoint.masks}
    scales = {(scale.position, scale.name.removesuffix("_scale")): scale for scale in checkpoint.scales}
    for param in matrices(checkpoint.network):
        key = param.position, param.name
        if key not in masks and key not in scales:
            continue
        assert param.layer is not None
        density, broken = _counts(checkpoint, param) if key in masks else (None, None)
        scale = scales.get(key)
        group = None if scale is None else -(-param.shape[1] // scale.shape[1])
        error = errors[param.layer].get(param.name) if param.layer < len(errors) else None
        yield MatrixFacts(param, density, broken, group, error)


def _counts(checkpoint: Checkpoint, param: Param) -> tuple[float, int | None]:
    """Returns density and broken groups of a mask."""
    rows, columns = param.shape
    kept, broken, has_groups = 0, 0, columns % _GROUP == 0
    for start in range(0, rows, _ROWS):
        mask = read_mask(checkpoint, param, [np.arange(start, min(start + _ROWS, rows)), np.arange(columns)])
        kept += int(mask.sum())
        if has_groups:
            broken += int((mask.unflatten(1, (-1, _GROUP)).sum(2) > _KEPT).sum())
    return kept / (rows * columns), broken if has_groups else None
