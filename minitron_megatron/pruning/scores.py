"""Importance scores: their aggregation, and the file that stores them.

Minitron (2407.14679, section 2.2): forward passes over a calibration set give every hidden channel, ffn neuron and
query head a number per token; the numbers are aggregated first over the tokens of each sequence, then over the
sequences.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.artifacts.manifest import MANIFEST
from minitron_megatron.config.schema import Aggregation, DepthSearch, Unit
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.model.axes import HIDDEN
from minitron_megatron.model.layers import PrunableAxis, Sublayer
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.cpu import in_blocks

FILE = "scores.safetensors"
DEPTH = "depth"
_DTYPES = (torch.float32, torch.float64, torch.int64)


@dataclass
class DepthSettings:
    """How `Scores.depth` was measured.

    Attributes:
        unit: transformer layers, or sublayers by their position in the network.
        search: what was skipped: one unit, a block of units, or one unit after another.
        drop: number of units in a block, or number that was skipped one after another.
        protect_first, protect_last: number of leading and trailing layers that are never dropped.
    """

    unit: Unit = Unit.LAYER
    search: DepthSearch = DepthSearch.SINGLE
    drop: int = 1
    protect_first: int = 0
    protect_last: int = 0

    def units(self, network: Network) -> list[tuple[int, ...]]:
        """Returns the positions of the sublayers in each unit."""
        if self.unit is Unit.LAYER:
            return network.layers
        return [(position,) for position in range(len(network.sublayers))]

    def protected(self, network: Network) -> list[int]:
        """Returns the units that are never dropped."""
        last = len(network.layers) - self.protect_last
        return [
            number
            for number, unit in enumerate(self.units(network))
            if not self.protect_first <= network.layer_of(unit[0]) < last
        ]


@dataclass
class Scores:
    """Importance of everything that can be pruned; larger is more important. float64 throughout.

    Attributes:
        network: that was scored.
        hidden: `[hidden]`, summed over all norms of the network.
        elements: by the setting of an axis, for each sublayer that has it, in order, `[element]`; for an axis within an
            outer one, `[outer element, element]`. The score of an outer element is the sum over its elements.
        depth: by criterion, the effect of skipping a unit, `[unit]`; in a block search, of skipping the block that
            begins there. NaN where nothing was skipped.
        depth_settings: how `depth` was measured.
        rounds: for `hidden` and `depth`, the round in which an element was last scored; in a greedy search, the step at
            which a unit was dropped, and one more than the last step for the others. An element of an earlier round is
            less important, whatever its score. Empty if there was one round.
        element_rounds: the same for `elements`.
        settings: how it was scored, and the hash of the calibration data.
        checkpoint: fingerprint of the checkpoint that was scored, or None.
    """

    network: Network
    hidden: Tensor
    elements: dict[str, list[Tensor]]
    depth: dict[str, Tensor] = field(default_factory=dict)
    depth_settings: DepthSettings = field(default_factory=DepthSettings)
    rounds: dict[str, Tensor] = field(default_factory=dict)
    element_rounds: dict[str, list[Tensor]] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    checkpoint: str | None = None

    def of(self, position: int) -> dict[str, Tensor]:
        """Returns the scores of the sublayer at a position, by setting."""
        return self._at(position, self.elements)

    def rounds_of(self, position: int) -> dict[str, Tensor]:
        """Returns the rounds of the sublayer at a position, by setting."""
        return self._at(position, self.element_rounds)

    def along(self, position: int, axis: PrunableAxis) -> tuple[Tensor, Tensor | None]:
        """Returns scores and rounds of the elements of any axis of a sublayer.

        An axis that others lie within has no scores of its own: an element is as important as the sum of what lies
        within it and was scored last.
        """
        own, rounds = self.of(position), self.rounds_of(position)
        if axis.setting in own:
            return own[axis.setting], rounds.get(axis.setting)
        prunable = self.network.sublayers[position].prunable
        inner = next(other for other in prunable if other.axis.within == axis.axis.name)
        return _outer_scores(own[inner.setting], rounds.get(inner.setting))

    def _at(self, position: int, values: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        kind, number = type(self.network.sublayers[position]), self.network.number(position)
        return {axis.setting: values[axis.setting][number] for axis in kind.scored() if axis.setting in values}

    def write(self, folder: Path) -> None:
        """Writes `scores.safetensors` into `folder`."""
        tensors = {HIDDEN.name: self.hidden}
        tensors |= {f"depth.{name}": values for name, values in self.depth.items()}
        tensors |= {f"rounds.{name}": values for name, values in self.rounds.items()}
        for _, axis in scored_axes(self.network):
            tensors |= _named(axis.axis.name, self.elements[axis.setting])
            if self.element_rounds:
                tensors |= _named(f"rounds.{axis.axis.name}", self.element_rounds[axis.setting])
        metadata = {
            "network": self.network.to_dict(),
            "criteria": list(self.depth),  # in order: a file of tensors is sorted by name
            "depth_settings": asdict(self.depth_settings),
            "settings": self.settings,
            "checkpoint": self.checkpoint,
        }
        save_file(
            {name: values.contiguous() for name, values in tensors.items()},
            folder / FILE,
            metadata={name: json.dumps(value) for name, value in metadata.items()},
        )

    @classmethod
    def read(cls, folder: Path) -> "Scores":
        """Reads the scores in `folder`.

        Raises:
            CheckpointError: there are no scores, or they are damaged.
        """
        if not (folder / MANIFEST).exists():
            raise CheckpointError(f"scores = {folder} is not the finished output of `score`: it has no {MANIFEST}")
        try:
            with safe_open(folder / FILE, framework="pt") as f:
                metadata = {name: json.loads(value) for name, value in f.metadata().items()}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, it is no dict
            depth = dict(metadata["depth_settings"])
            depth |= {"unit": Unit(depth["unit"]), "search": DepthSearch(depth["search"])}
            # Earlier versions called the network its shape.
            network = Network.from_dict(metadata["network"] if "network" in metadata else metadata["shape"])
            elements, rounds = {}, {}
            for kind, axis in scored_axes(network):
                count = len(network.positions(kind))
                elements[axis.setting] = _listed(tensors, axis.axis.name, count)
                if any(name.startswith(f"rounds.{axis.axis.name}") for name in tensors):
                    rounds[axis.setting] = _listed(tensors, f"rounds.{axis.axis.name}", count)
            scores = cls(
                network,
                tensors.pop(HIDDEN.name),
                elements,
                depth={name: tensors[f"depth.{name}"] for name in metadata["criteria"]},
                depth_settings=DepthSettings(**depth),
                rounds={n: tensors[f"rounds.{n}"] for n in (HIDDEN.name, DEPTH) if f"rounds.{n}" in tensors},
                element_rounds=rounds,
                settings=metadata["settings"],
                checkpoint=metadata["checkpoint"],
            )
            raise_if_any(scores._problems())
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise CheckpointError(f"{folder / FILE} is not whole: {e}") from e
        return scores

    def _problems(self) -> list[str]:
        """Returns what does not match the network, one sentence each."""
        network, depth = self.network, self.depth_settings
        counts = {name: getattr(depth, name) for name in ("drop", "protect_first", "protect_last")}
        problems = [
            f"{name} = {value!r} is not a count"
            for name, value in counts.items()
            if type(value) is not int or value < 0
        ]
        expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {HIDDEN.name: (self.hidden, (network.hidden_size,))}
        for kind, axis in scored_axes(network):
            for number, position in enumerate(network.positions(kind)):
                size = network.sublayers[position].score_shape(axis)
                for what, values in (("", self.elements), ("rounds.", self.element_rounds)):
                    if axis.setting in values:
                        expected[f"{what}{axis.setting}.{number}"] = values[axis.setting][number], size
        units = (0,) if problems else (len(depth.units(network)),)
        expected |= {f"depth.{name}": (values, units) for name, values in self.depth.items()}
        for name, values in self.rounds.items():
            expected[f"rounds.{name}"] = values, units if name == DEPTH else (network.hidden_size,)
        for name, (values, size) in expected.items():
            if tuple(values.shape) != size or values.dtype not in _DTYPES:
                problems.append(f"{name} is {values.dtype} {list(values.shape)}, and the network has {list(size)}")
        return problems


def scored_axes(network: Network) -> list[tuple[type[Sublayer], PrunableAxis]]:
    """Returns the axes of a network's kinds that have scores of their own, sorted by setting."""
    axes = [(kind, axis) for kind in network.kinds for axis in kind.scored()]
    return sorted(axes, key=lambda pair: pair[1].setting)


def _named(name: str, values: list[Tensor]) -> dict[str, Tensor]:
    """Names the tensors of all sublayers for the file: stacked to one if they are of one size, else one by one."""
    if len({tuple(value.shape) for value in values}) == 1:
        return {name: torch.stack(values)}
    return {f"{name}.{number}": value for number, value in enumerate(values)}


def _listed(tensors: dict[str, Tensor], name: str, count: int) -> list[Tensor]:
    """Reverses `_named`."""
    values = list(tensors[name]) if name in tensors else [tensors[f"{name}.{number}"] for number in range(count)]
    if len(values) != count:
        raise ValueError(f"{name} is of {len(values)} sublayers, and the network has {count}")
    return values


def descending(values: Tensor, rounds: Tensor | None) -> np.ndarray:
    """Returns indices along the last axis by falling importance. Later rounds are more important."""
    values = values.numpy()
    rounds = np.zeros_like(values) if rounds is None else rounds.numpy()
    return np.lexsort((-values, -rounds))


def _outer_scores(values: Tensor, rounds: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Sums the scores within each element of an outer axis, over what was scored last; returns them with their rounds.

    Args:
        values, rounds: `[..., outer element, element within]`.
    """
    if rounds is None:
        return values.sum(-1), None
    last = rounds.amax(-1, keepdim=True)
    return (values * (rounds == last)).sum(-1), last[..., 0]


def aggregate_sequence(x: Tensor, how: Aggregation) -> Tensor:
    """Sums over tokens what a per-sequence score is computed from; parts of a sequence add up.

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
    """Returns the scores of whole sequences, from the sums over all their tokens.

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


def batch_score(first: Tensor, second: Tensor, num_sequences: Tensor | float, how: Aggregation) -> Tensor:
    """Aggregates the scores of all sequences to one.

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
