"""Importance scores: what they are, how they are aggregated, and the file they are kept in.

Minitron (2407.14679, section 2.2): forward passes over a calibration set give every hidden channel, ffn
neuron and query head a number per token; the numbers are aggregated over the tokens of each sequence
first, and over the sequences second.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.checkpoint.manifest import MANIFEST
from minitron_megatron.config.schema import Aggregation, DepthSearch, Unit
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.parallel.cpu import in_blocks

FILE = "scores.safetensors"
WIDTH = ("hidden", "ffn", "head")
_DTYPES = (torch.float32, torch.float64, torch.int64)


@dataclass
class DepthSettings:
    """What the numbers in `Scores.depth` are of.

    Attributes:
        unit: layers, or sublayers by their position in the pattern.
        search: what was left out: one unit, a block of units, or one unit after another.
        drop: how many units a block has, or how many were left out one after another.
        protect_first, protect_last: layers at both ends that never go.
    """

    unit: Unit = Unit.LAYER
    search: DepthSearch = DepthSearch.SINGLE
    drop: int = 1
    protect_first: int = 0
    protect_last: int = 0

    def protected(self, num_units: int) -> list[int]:
        """Which of all units never go."""
        per_layer = 1 if self.unit is Unit.LAYER else 2
        first, last = per_layer * self.protect_first, num_units - per_layer * self.protect_last
        return [number for number in range(num_units) if not first <= number < last]


@dataclass
class Scores:
    """Importance of everything that can be pruned; larger is more important. float64 throughout.

    Attributes:
        shape: the network that was scored.
        hidden: `[hidden]`, summed over all norms of the network.
        ffn: `[MLP sublayer, ffn]`.
        head: `[attention sublayer, query group, head of the group]`. A query group is as important as the sum of
            its heads.
        depth: by criterion, what leaving out a unit does, `[unit]`; with a search for blocks, what leaving out the
            block that begins there does. NaN where nothing was left out.
        depth_settings: what these numbers are of.
        rounds: by field, in which round of several an element was scored last; in a greedy search, at which step a
            unit went, and for those that stay one more than the last step. An element of an earlier round is less
            important, whatever its score. Empty if one round scored everything.
        settings: how the scores were made: criteria, aggregation, calibration data and its hash.
        checkpoint: fingerprint of the checkpoint that was scored, or None.
    """

    shape: ModelShape
    hidden: Tensor
    ffn: Tensor
    head: Tensor
    depth: dict[str, Tensor] = field(default_factory=dict)
    depth_settings: DepthSettings = field(default_factory=DepthSettings)
    rounds: dict[str, Tensor] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    checkpoint: str | None = None

    def write(self, folder: Path) -> None:
        """Write `scores.safetensors` into `folder`."""
        tensors = {name: getattr(self, name).contiguous() for name in WIDTH}
        tensors |= {f"depth.{name}": values.contiguous() for name, values in self.depth.items()}
        tensors |= {f"rounds.{name}": values.contiguous() for name, values in self.rounds.items()}
        metadata = {
            "shape": self.shape.to_dict(),
            "criteria": list(self.depth),  # in order: a file of tensors is sorted by name
            "depth_settings": asdict(self.depth_settings),
            "settings": self.settings,
            "checkpoint": self.checkpoint,
        }
        save_file(tensors, folder / FILE, metadata={name: json.dumps(value) for name, value in metadata.items()})

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
                metadata = {name: json.loads(value) for name, value in f.metadata().items()}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, it is no dict
            depth = dict(metadata["depth_settings"])
            depth |= {"unit": Unit(depth["unit"]), "search": DepthSearch(depth["search"])}
            found = cls(
                ModelShape.from_dict(metadata["shape"]),
                **{name: tensors.pop(name) for name in WIDTH},
                depth={name: tensors[f"depth.{name}"] for name in metadata["criteria"]},
                depth_settings=DepthSettings(**depth),
                rounds={name.partition(".")[2]: t for name, t in tensors.items() if name.startswith("rounds.")},
                settings=metadata["settings"],
                checkpoint=metadata["checkpoint"],
            )
            raise_if_any(found._problems())
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise CheckpointError(f"{folder / FILE} is not whole: {e}") from e
        return found

    def _problems(self) -> list[str]:
        """What does not go with the shape, one sentence each."""
        shape, depth = self.shape, self.depth_settings
        counts = {name: getattr(depth, name) for name in ("drop", "protect_first", "protect_last")}
        found = [
            f"{name} = {value!r} is no count" for name, value in counts.items() if type(value) is not int or value < 0
        ]
        by_layer = depth.unit is Unit.LAYER
        if self.depth and by_layer and not shape.is_uniform:
            found.append(f"its depth is of layers, and the pattern {shape.pattern!r} has none")
        units = len(shape.pattern) // 2 if by_layer else len(shape.pattern)
        sizes = {
            "hidden": (shape.hidden,),
            "ffn": (len(shape.sublayers(MLP)), shape.ffn),
            "head": (len(shape.sublayers(ATTENTION)), shape.num_query_groups, shape.heads_per_group),
        }
        tensors = {name: (getattr(self, name), size) for name, size in sizes.items()}
        tensors |= {f"depth.{name}": (values, (units,)) for name, values in self.depth.items()}
        tensors |= {f"rounds.{name}": (values, sizes.get(name, (units,))) for name, values in self.rounds.items()}
        for name, (values, size) in tensors.items():
            if tuple(values.shape) != size or values.dtype not in _DTYPES:
                found.append(f"{name} is {values.dtype} {list(values.shape)}, and the network has {list(size)}")
        return found


def descending(values: Tensor, rounds: Tensor | None) -> np.ndarray:
    """Indices along the last axis by falling importance. What was scored in a later round is more important."""
    values = values.numpy()
    rounds = np.zeros_like(values) if rounds is None else rounds.numpy()
    return np.lexsort((-values, -rounds))


def group_scores(heads: Tensor, rounds: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores and rounds of whole query groups: the sum of the heads scored last.

    Args:
        heads, rounds: `[..., group, head of the group]`.
    """
    if rounds is None:
        return heads.sum(-1), None
    last = rounds.amax(-1, keepdim=True)
    return (heads * (rounds == last)).sum(-1), last[..., 0]


def aggregate_sequence(x: Tensor, how: Aggregation) -> Tensor:
    """The sums over tokens from which a per-sequence score follows; parts of a sequence add up.

    Args:
        x: `[seq, batch, elements]`, zero for tokens that do not count.
        how: the aggregation over the tokens.

    Returns:
        first and second sums `[2, batch, elements]` in float64, see `sequence_score`.
    """
    first, second = sums = torch.zeros(2, *x.shape[1:], dtype=torch.float64, device=x.device)
    for (block,) in in_blocks(x):
        # Short sums may be of float32; long ones are of float64.
        first += (block if how is Aggregation.VARIANCE else block.abs()).sum(0, dtype=torch.float32)
        if how is not Aggregation.MEAN:
            second += block.float().square().sum(0)
    return sums


def sequence_score(first: Tensor, second: Tensor, num_tokens: Tensor, how: Aggregation) -> Tensor:
    """Scores of whole sequences, from the sums over all their tokens.

    Args:
        first, second: sums `[..., batch, elements]`, see `aggregate_sequence`.
        num_tokens: valid tokens of each sequence `[batch]`, at least 1.
        how: the aggregation over the tokens; the variance is the population's.
    """
    n = num_tokens.unsqueeze(-1)
    if how is Aggregation.MEAN:
        return first / n
    if how is Aggregation.L2:
        return second.sqrt()
    return (second / n - (first / n).square()).clamp(min=0)


def batch_score(first: Tensor, second: Tensor, num_sequences: float, how: Aggregation) -> Tensor:
    """One score from those of all sequences.

    Args:
        first, second: sums over the sequences of their scores, none of them negative, and of the squares.
        num_sequences: at least 1.
        how: the aggregation over the sequences; the variance is the population's.
    """
    if how is Aggregation.MEAN:
        return first / num_sequences
    if how is Aggregation.L2:
        return second.sqrt()
    return (second / num_sequences - (first / num_sequences).square()).clamp(min=0)
