"""Pairs the hidden states of a student with its teacher's."""

from dataclasses import dataclass, replace

from minitron_megatron.config.loss import EMBEDDING, LAYER, HiddenConfig, LayerMap, Projection
from minitron_megatron.model.network import Network

Tap = tuple[str, int]
"""Where a hidden state is taken: the point (`loss.hidden.points`) in a transformer layer, and the layer, from 0."""


@dataclass(frozen=True)
class Pair:
    """A state of a student's transformer layer and one of its teacher's. Layers count from 0."""

    point: str
    student: int
    teacher: int

    @property
    def student_tap(self) -> Tap:
        """Where the student's state is."""
        return self.point, self.student

    @property
    def teacher_tap(self) -> Tap:
        """Where the teacher's state is."""
        return self.point, self.teacher

    @property
    def name(self) -> str:
        """Name of the pair's loss."""
        return self.point if self.point == EMBEDDING else f"{self.point}_{self.student}_{self.teacher}"


def resolve_pairs(config: HiddenConfig, student: Network, teacher: Network) -> list[Pair]:
    """Returns the configured pairs.

    Args:
        config: which pairs.
        student, teacher: the networks. Points that a layer of a pair does not have are left out.
    """
    count, of = len(student.layers), len(teacher.layers)
    if config.pairs is not None:
        layers = [tuple(pair) for pair in config.pairs]
    elif config.map is LayerMap.UNIFORM:
        ends = [(layer + 1) * of / count for layer in range(count)]
        layers = [(layer, max(round(end), 1) - 1) for layer, end in enumerate(ends)]
    else:
        shift = of - count
        layers = [(layer, layer + shift) for layer in range(count) if layer + shift >= 0]
    pairs = []
    for point in config.points:
        if point == EMBEDDING:
            pairs.append(Pair(point, 0, 0))
        else:
            pairs += [
                Pair(point, own, other)
                for own, other in layers
                if point in _points(student, own) and point in _points(teacher, other)
            ]
    return pairs


def _points(network: Network, layer: int) -> list[str]:
    """Returns the points at which a transformer layer has a state."""
    return [LAYER, *(network.sublayers[position].name for position in network.layers[layer])]


def hidden_problems(config: HiddenConfig, student: Network, teacher: Network) -> list[str]:
    """Returns why the hidden states of two networks cannot be compared as configured, one sentence each."""
    if not config.weight:
        return []
    problems = []
    networks = {"student": student, "teacher": teacher}
    for pair in config.pairs or ():
        outside = [
            f"loss.hidden.pairs has {list(pair)}, and the {role} has layers 0 to {len(network.layers) - 1}: name one "
            f"of these"
            for (role, network), layer in zip(networks.items(), pair, strict=True)
            if not 0 <= layer < len(network.layers)
        ]
        problems += outside
        if not outside and not resolve_pairs(replace(config, pairs=[pair]), student, teacher):
            own, other = (
                ", ".join(_points(network, layer)) for network, layer in zip(networks.values(), pair, strict=True)
            )
            problems.append(
                f"loss.hidden.pairs has {list(pair)}: the student's layer has the points {own}, the teacher's {other}, "
                f"and loss.hidden.points = {', '.join(config.points)} is not in both; name other layers, or add the "
                f"point layer"
            )
    if student.hidden_size != teacher.hidden_size and config.projection is Projection.NONE:
        problems.append(
            f"loss.hidden.projection = none, and student.hidden_size = {student.hidden_size} is not "
            f"teacher.hidden_size = {teacher.hidden_size}: set loss.hidden.projection to shared or per_pair"
        )
    return problems
