"""Which hidden states of a student and its teacher belong together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minitron_megatron.config.loss import HiddenConfig, LayerMap, Point, Projection
from minitron_megatron.distillation.teachers import Tap
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape

# The sublayer that a layer needs for a point to be there.
_SUBLAYERS = {Point.ATTENTION: ATTENTION, Point.MLP: MLP}


@dataclass(frozen=True)
class Pair:
    """Two states that are to become alike: of a student's layer and a teacher's."""

    point: Point
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
        """What the pair's loss is called."""
        name = self.point.value
        return name if self.point is Point.EMBEDDING else f"{name}_{self.student}_{self.teacher}"


def resolve_pairs(config: HiddenConfig, student: Sequence[str], teacher: Sequence[str]) -> list[Pair]:
    """Returns the pairs that a configuration asks for.

    Args:
        config: which.
        student, teacher: the sublayers in each layer (`ModelShape.megatron_layers`). Of a pair that is named, points
            that one of both layers does not have are left out.
    """
    if config.pairs is not None:
        layers = [tuple(pair) for pair in config.pairs]
    elif config.map is LayerMap.UNIFORM:
        ends = [(layer + 1) * len(teacher) / len(student) for layer in range(len(student))]
        layers = [(layer, max(round(end), 1) - 1) for layer, end in enumerate(ends)]
    else:
        shift = len(teacher) - len(student)
        layers = [(layer, layer + shift) for layer in range(len(student)) if layer + shift >= 0]
    pairs = []
    for point in config.points:
        if point is Point.EMBEDDING:
            pairs.append(Pair(point, 0, 0))
        else:
            needed = _SUBLAYERS.get(point, "")
            pairs += [
                Pair(point, own, other) for own, other in layers if needed in student[own] and needed in teacher[other]
            ]
    return pairs


def hidden_problems(config: HiddenConfig, student: ModelShape, teacher: ModelShape) -> list[str]:
    """Returns why two networks cannot be compared so, one sentence each."""
    if not config.weight:
        return []
    problems = []
    shapes = {"student": student, "teacher": teacher}
    layers = {role: shape.megatron_layers for role, shape in shapes.items()}
    if config.pairs is None and set(config.points) != {Point.EMBEDDING}:
        problems += [
            f"loss.hidden.map = {config.map.value} needs whole layers, and {role}.pattern = {shape.pattern!r} is not "
            f"'*-' repeated: name loss.hidden.pairs, where each sublayer of this network counts as a layer"
            for role, shape in shapes.items()
            if not shape.is_uniform
        ]
    for pair in config.pairs or ():
        outside = [
            f"loss.hidden.pairs has {list(pair)}, and the {role} has layers 0 to {len(layers[role]) - 1}: name one of "
            f"these"
            for role, layer in zip(layers, pair, strict=True)
            if not 0 <= layer < len(layers[role])
        ]
        problems += outside
        if not outside and not resolve_pairs(replace(config, pairs=[pair]), *layers.values()):
            own, other = (of[layer] for of, layer in zip(layers.values(), pair, strict=True))
            problems.append(
                f"loss.hidden.pairs has {list(pair)}: the student's layer is {own!r}, the teacher's {other!r} ('*' is "
                f"attention, '-' an MLP), and loss.hidden.points = {', '.join(point.value for point in config.points)} "
                f"is not in both; name other layers, or add the point layer"
            )
    if student.hidden != teacher.hidden and config.projection is Projection.NONE:
        problems.append(
            f"loss.hidden.projection = none, and student.hidden = {student.hidden} is not teacher.hidden = "
            f"{teacher.hidden}: set loss.hidden.projection to shared or per_pair"
        )
    return problems
