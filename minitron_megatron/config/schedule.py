"""Settings that change over the steps of a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from minitron_megatron.config.reader import near, show


class Shape(str, Enum):
    """How a setting gets from one point to the next."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"  # it stays, and takes the next value at the next point


@dataclass(frozen=True)
class Schedule:
    """The values of a setting over the steps of a run, counted from 1.

    Before the first point it has the first value, and after the last one the last.

    Attributes:
        points: steps and values, in the order of the steps.
        shape: of the way between two points.
    """

    points: Sequence[tuple[int, float]]
    shape: Shape = Shape.LINEAR

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Schedule":
        """Makes a schedule of settings, in which `problems` has found nothing."""
        points = [(int(step), float(value)) for step, value in values["points"]]
        return cls(points, Shape(values.get("shape", Shape.LINEAR)))

    def at(self, step: int) -> float:
        """Returns the value at a step."""
        later = next((number for number, (own, _) in enumerate(self.points) if own > step), len(self.points))
        if later in (0, len(self.points)) or self.shape is Shape.CONSTANT:
            return self.points[max(later - 1, 0)][1]
        (first, before), (last, after) = self.points[later - 1 : later + 1]
        part = (step - first) / (last - first)
        if self.shape is Shape.COSINE:
            part = (1 - math.cos(math.pi * part)) / 2
        return before + part * (after - before)


def schedule_problems(values: object, where: str) -> list[str]:
    """Returns what is wrong with the settings of a schedule, one sentence each.

    Args:
        values: the settings.
        where: their dotted name.
    """
    example = f"write {where}={{points:[[1,1.0],[500,0.1]],shape:linear}}"
    if not isinstance(values, dict) or "points" not in values:
        return [f"{where} = {show(values)}: must have points, each a step and a value there: {example}"]
    problems = [
        f"{where}.{key} is not a setting: {near(str(key), ['points', 'shape'])}"
        for key in values
        if key not in ("points", "shape")
    ]
    shapes = [shape.value for shape in Shape]
    if values.get("shape", Shape.LINEAR) not in shapes:
        problems.append(f"{where}.shape = {show(values['shape'])}: must be one of {', '.join(shapes)}")
    points = values["points"]
    if not isinstance(points, list) or not points or not all(map(_is_point, points)):
        return [*problems, f"{where}.points = {show(points)}: must be steps, from 1, with a value for each: {example}"]
    steps = [step for step, _ in points]
    if steps != sorted(set(steps)):
        shown = ", ".join(map(str, steps))
        problems.append(f"{where}.points has the steps {shown}: each must be later than the one before")
    return problems


def _is_point(point: object) -> bool:
    if not isinstance(point, list) or len(point) != 2 or any(isinstance(number, bool) for number in point):
        return False
    step, value = point
    return isinstance(step, int) and step >= 1 and isinstance(value, int | float) and math.isfinite(value)
