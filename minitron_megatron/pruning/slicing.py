"""Pruning is indexing: a plan turns any source of weights into a smaller one.

`merge_heads` merges the first dropped heads into the last kept ones (Minitron, 2407.14679, section 2.3):
`head_i + (head_i - head_(2K-i+1))`. The paper does not say which matrices this applies to. We apply it to the rows of
the query projection (and their biases): under grouped-query attention the paper merges query heads only, and kept and
dropped heads share keys and values anyway.
"""

from pathlib import Path

import numpy as np
import torch

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.model.axes import Param
from minitron_megatron.model.parameters import parameters
from minitron_megatron.pruning.plan import Plan


class Pruned:
    """A source of weights, pruned by a plan. Reads lazily."""

    def __init__(self, source: TensorSource, plan: Plan):
        assert source.network == plan.source
        self.source = source
        self.plan = plan
        self.network = plan.target
        self.dtype = source.dtype
        self._origins = {(param.position, param.name): param for param in parameters(source.network)}

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`."""
        position = None if param.position is None else self.plan.sublayers[param.position]
        origin, kept = self._origins[position, param.name], self.plan.kept(position)
        positions = [k[i] for k, i in zip(origin.index(kept), index, strict=True)]
        tensor = self.source.read(origin, positions)
        if position is None or position not in self.plan.merge or not origin.takes_merged:
            return tensor
        sublayer = self.plan.source.sublayers[position]
        if sublayer.merged is None:
            return tensor
        merged = sublayer.axis(sublayer.merged).axis
        rows = origin.index({**kept, merged.name: np.array(self.plan.merge[position])})[0][index[0]]
        # A source needs ascending, distinct positions, which those of partners are not.
        wanted, back = np.unique(rows, return_inverse=True)
        partner = self.source.read(origin, [wanted, *positions[1:]])[torch.from_numpy(back)]
        mixed = (2 * tensor.float() - partner.float()).to(tensor.dtype)
        return torch.where(torch.from_numpy(rows != positions[0]).view(-1, *[1] * (tensor.dim() - 1)), mixed, tensor)


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
    write_checkpoint(
        output,
        Pruned(checkpoint, plan),
        checkpoint.dtype,
        manifest,
        hf_assets if hf_assets.is_dir() else None,
        files=plan.write,
        tensor_ranks=tensor_ranks,
        args=checkpoint.megatron_args(),
    )
