"""Settings that change over the steps of a run."""

import math
from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.reader import show


class Shape(str, Enum):
    """How a setting gets from one point to the next."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"  # it stays, and takes the next value at the next point


@dataclass
class Schedule:
    """The values of a setting over the steps of a run, counted from 1.

    Before the first point it has the first value, and after the last one the last.

    Attributes:
        points: pairs of a step and the value there, in the order of the steps.
        shape: of the way between two points.
    """

    points: list[list[float]] = field(default_factory=list)
    shape: Shape = Shape.LINEAR

    @property
    def last_step(self) -> int:
        """The step of the last point."""
        return int(self.points[-1][0])

    @property
    def largest(self) -> float:
        """The largest value."""
        return max(value for _, value in self.points)

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

    def problems(self, where: str) -> list[str]:
        """Returns what is wrong with the settings, one sentence each."""
        example = "write pairs of a step, from 1, and a value, as in [[1,1.0],[500,0.1]]"
        if not self.points or any(len(point) != 2 or point[0] < 1 or point[0] % 1 for point in self.points):
            return [f"{where}points = {show(self.points)}: {example}"]
        steps = [int(step) for step, _ in self.points]
        if steps != sorted(set(steps)):
            shown = ", ".join(map(str, steps))
            return [f"{where}points has the steps {shown}: each must be later than the one before"]
        return []
