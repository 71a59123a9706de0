"""Pruning is indexing: a plan turns any source of weights into a smaller one.

`merge_heads` merges the first dropped heads into the last kept ones (Minitron, 2407.14679, section 2.3):
`head_i + (head_i - head_(2K-i+1))`. The paper does not say which matrices this applies to. We apply it to the rows of
the query projection (and their biases): under grouped-query attention the paper merges query heads only, and kept and
dropped heads share keys and values anyway.
"""

import logging
from pathlib import Path

import numpy as np
import torch

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.companions import columns_of, mask_of, matrices, pack_mask, read_mask
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.config.sparsify import UNSTRUCTURED
from minitron_megatron.model.axes import Param
from minitron_megatron.model.parameters import parameters
from minitron_megatron.pruning.plan import Plan

logger = logging.getLogger(__name__)


class Pruned:
    """A source of weights, pruned by a plan. Reads lazily."""

    def __init__(self, source: TensorSource, plan: Plan):
        assert source.network == plan.source
        self.source = source
        self.plan = plan
        self.network = plan.target
        self.dtype = source.dtype
        self._origins = {(param.position, param.name): param for param in parameters(source.network)}
        self._matrices = {(param.position, mask_of(param).name): param for param in matrices(self.network)}

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`. Masks of the source are cut as well."""
        if matrix := self._matrices.get((param.position, param.name)):
            return self._read_mask(matrix, index)
        position = None if param.position is None else self.plan.sublayers[param.position]
        origin, kept = self._origins[position, param.name], self.plan.kept(position)
        positions = [k[i] for k, i in zip(origin.index(kept), index, strict=True)]
        tensor = self.source.read(origin, positions)
        partners = self._partners(origin, index[0])
        if partners is None:
            return tensor
        # A source needs ascending, distinct positions, which those of partners are not.
        wanted, back = np.unique(partners, return_inverse=True)
        partner = self.source.read(origin, [wanted, *positions[1:]])[torch.from_numpy(back)]
        mixed = (2 * tensor.float() - partner.float()).to(tensor.dtype)
        return torch.where(_as_column(partners != positions[0], tensor.dim()), mixed, tensor)

    def _partners(self, origin: Param, rows: np.ndarray) -> np.ndarray | None:
        """Returns for each row of a matrix the row of the source that is merged into it: itself for none.

        Args:
            origin: the source's matrix.
            rows: of the pruned one.
        """
        position = origin.position
        if position is None or position not in self.plan.merge or not origin.takes_merged:
            return None
        sublayer = self.plan.source.sublayers[position]
        if sublayer.merged is None:
            return None
        merged = sublayer.axis(sublayer.merged).axis
        kept = self.plan.kept(position)
        return origin.index({**kept, merged.name: np.array(self.plan.merge[position])})[0][rows]

    def _read_mask(self, matrix: Param, index: list[np.ndarray]) -> torch.Tensor:
        """Reads positions of the packed mask of a matrix."""
        assert matrix.position is not None
        position = self.plan.sublayers[matrix.position]
        origin = self._origins[position, matrix.name]
        rows, columns = origin.index(self.plan.kept(position))
        own = columns[columns_of(index[1], matrix.shape[1])]
        mask = read_mask(self.source, origin, [rows[index[0]], own])
        partners = self._partners(origin, index[0])
        if partners is not None:  # what is merged has the weights of both
            wanted, back = np.unique(partners, return_inverse=True)
            mask = mask | read_mask(self.source, origin, [wanted, own])[torch.from_numpy(back)]
        return pack_mask(mask)


def _as_column(mask: np.ndarray, num_dims: int) -> torch.Tensor:
    return torch.from_numpy(mask).view(-1, *[1] * (num_dims - 1))


def write_pruned(output: Path, checkpoint: Checkpoint, plan: Plan, manifest: Manifest, tensor_ranks: int) -> None:
    """Writes the pruned checkpoint, with the plan and the files that accompany the source. Collective.

    Args:
        output: the folder to write.
        checkpoint: to prune; it is not changed.
        plan: what to keep.
        manifest: of the result.
        tensor_ranks: see `write_checkpoint`.
    """
    hf_assets = checkpoint.huggingface_folder
    if checkpoint.scales:
        of_cache = " and those of its KV cache" if checkpoint.cache_scales else ""
        logger.warning(
            "%s is quantised: its scales%s are left out, so quantise the result again", checkpoint.root, of_cache
        )
    masks = [
        mask_of(param)
        for param in matrices(plan.target)
        if param.position is not None and (plan.sublayers[param.position], mask_of(param).name) in _masked(checkpoint)
    ]
    if masks:
        manifest.details["pattern"] = UNSTRUCTURED
        logger.warning("masks are cut with their matrices: what is zero stays zero, but N:M groups are no longer whole")
    write_checkpoint(
        output,
        Pruned(checkpoint, plan),
        checkpoint.dtype,
        manifest,
        hf_assets if hf_assets.is_dir() else None,
        files=plan.write,
        tensor_ranks=tensor_ranks,
        args=checkpoint.megatron_args(),
        companions=masks,
    )


def _masked(checkpoint: Checkpoint) -> set[tuple[int | None, str]]:
    """Returns position and name of the masks of a checkpoint."""
    return {(mask.position, mask.name) for mask in checkpoint.masks}
