"""The settings of one of several teachers."""

from dataclasses import dataclass

from minitron_megatron.config.checks import at_least
from minitron_megatron.config.reader import show


@dataclass
class TeacherConfig:
    """One of several teachers.

    Attributes:
        teacher: its checkpoint, or a cache of its predictions.
        weight: factor of `loss.kd_logits_weight`, for the divergence from this teacher.
        first_step: at which it begins to teach.
        last_step: of its teaching; null for the last one of the run.
    """

    teacher: str = "???"
    weight: float = 1.0
    first_step: int = 1
    last_step: int | None = None

    def teaches_at(self, step: int) -> bool:
        """Returns whether it teaches at a step, from 1."""
        return self.first_step <= step and (self.last_step is None or step <= self.last_step)

    def problems(self, steps: int, where: str) -> list[str]:
        """Returns what is wrong with the settings in a run of so many steps, one sentence each."""
        problems = at_least(where, "first_step", self.first_step, 1)
        if self.weight <= 0:
            problems.append(
                f"{where}weight = {self.weight}: must be above 0; leave the teacher out if it does not teach"
            )
        last = steps if self.last_step is None else self.last_step
        if not self.first_step <= last <= steps:
            problems.append(
                f"{where}first_step = {self.first_step} and {where}last_step = {show(self.last_step)}: must be in this "
                f"order, and at most steps = {steps}"
            )
        return problems
