"""Pruning is indexing: a plan turns any source of weights into a smaller one.

With merged heads (Minitron, 2407.14679, section 2.3) the last kept heads keep a trace of the first dropped ones:
`head_i + (head_i - head_(2K-i+1))`. The paper does not say which matrices take part. We read it so that it is the
rows of the query projection (and their biases): under grouped-query attention the paper merges query heads only, and
keys and values are shared by kept and dropped heads anyway.
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
    """What a plan leaves of a source, as a source. Nothing is read before it is asked for."""

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
        if not origin.takes_merged or position not in self.plan.merge:
            return tensor
        sublayer = self.plan.source.sublayers[position]
        merged = sublayer.axis(sublayer.merged).axis.name
        rows = origin.index({**kept, merged: np.array(self.plan.merge[position])})[0][index[0]]
        # Partners do not ascend; a source wants ascending positions, each once.
        wanted, back = np.unique(rows, return_inverse=True)
        partner = self.source.read(origin, [wanted, *positions[1:]])[torch.from_numpy(back)]
        mixed = (2 * tensor.float() - partner.float()).to(tensor.dtype)
        return torch.where(torch.from_numpy(rows != positions[0]).view(-1, *[1] * (tensor.dim() - 1)), mixed, tensor)


def write_pruned(output: Path, checkpoint: Checkpoint, plan: Plan, manifest: Manifest, tensor_ranks: int) -> None:
    """Write what a plan leaves of a checkpoint, with the plan and all that travels with the checkpoint. Collective.

    Args:
        output: the folder to make.
        checkpoint: to cut; it is only read.
        plan: what stays.
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
