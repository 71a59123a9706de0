"""Importance scores: what they are, how they are aggregated, and the file they are kept in.

Minitron (2407.14679, section 2.2): forward passes over a calibration set give every hidden channel, ffn
neuron and query head a number per token; the numbers are aggregated over the tokens of each sequence
first, and over the sequences second.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.checkpoint.manifest import MANIFEST
from minitron_megatron.config.schema import Aggregation
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.shape import ModelShape

FILE = "scores.safetensors"
TENSORS = ("hidden", "ffn", "head", "layer")


@dataclass
class Scores:
    """Importance of everything that can be pruned; larger is more important.

    Attributes:
        shape: the network that was scored.
        hidden: `[hidden]`, summed over all norms of the network.
        ffn: `[MLP sublayer, ffn]`.
        head: `[attention sublayer, query group, head of the group]`.
        layer: Block Influence `[layer]`, 1 - E[cos(x_in, x_out)] over the valid tokens.
        settings: how they were made: aggregation, calibration data and its hash.
    """

    shape: ModelShape
    hidden: Tensor
    ffn: Tensor
    head: Tensor
    layer: Tensor
    settings: dict = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `scores.safetensors` into `folder`."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        metadata = {"shape": json.dumps(self.shape.to_dict()), "settings": json.dumps(self.settings)}
        save_file(tensors, folder / FILE, metadata=metadata)

    @classmethod
    def read(cls, folder: Path) -> "Scores":
        """Read the scores in `folder`.

        Raises:
            CheckpointError: there are none, or they are not whole.
        """
        if not (folder / MANIFEST).exists():
            raise CheckpointError(f"scores = {folder} is not the finished output of `score`: it has no {MANIFEST}")
        try:
            with safe_open(folder / FILE, framework="pt") as f:
                metadata = f.metadata()
                shape = ModelShape.from_dict(json.loads(metadata["shape"]))
                return cls(shape, **{n: f.get_tensor(n) for n in TENSORS}, settings=json.loads(metadata["settings"]))
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{folder / FILE} is not whole: {e}") from e


def aggregate_sequence(x: Tensor, mask: Tensor, how: Aggregation) -> tuple[Tensor, Tensor]:
    """The sums over tokens from which a per-sequence score follows; parts of a sequence add up.

    Args:
        x: `[seq, batch, elements]`.
        mask: `[seq, batch]`, 1 for tokens that count.
        how: the aggregation over the tokens.

    Returns:
        first and second sums `[batch, elements]` in float64, see `sequence_score`.
    """
    x = x.float() * mask.unsqueeze(-1)
    first = x.sum(0, dtype=torch.float64) if how is Aggregation.VARIANCE else x.abs().sum(0, dtype=torch.float64)
    second = first if how is Aggregation.MEAN else x.square().sum(0, dtype=torch.float64)
    return first, second


def sequence_score(first: Tensor, second: Tensor, num_tokens: Tensor, how: Aggregation) -> Tensor:
    """Scores of whole sequences, from the sums over all their tokens.

    Args:
        first, second: sums `[batch, elements]`, see `aggregate_sequence`.
        num_tokens: valid tokens of each sequence `[batch]`, at least 1.
        how: the aggregation over the tokens; the variance is the population's.
    """
    n = num_tokens.unsqueeze(-1)
    if how is Aggregation.MEAN:
        return first / n
    if how is Aggregation.L2:
        return second.sqrt()
    return (second / n - (first / n).square()).clamp(min=0)


@dataclass
class Moments:
    """Running sums over sequences, from which every aggregation over the batch follows."""

    first: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, *size: int) -> "Moments":
        return cls(torch.zeros(*size, dtype=torch.float64), torch.zeros(*size, dtype=torch.float64))

    def add(self, scores: Tensor) -> None:
        """Add the scores of more sequences, `[batch, elements]`, none of them negative."""
        self.first += scores.sum(0).cpu()
        self.second += scores.square().sum(0).cpu()

    def aggregate(self, num_sequences: int, how: Aggregation) -> Tensor:
        """The scores of all sequences as one."""
        if how is Aggregation.MEAN:
            return self.first / num_sequences
        if how is Aggregation.L2:
            return self.second.sqrt()
        return (self.second / num_sequences - (self.first / num_sequences).square()).clamp(min=0)
