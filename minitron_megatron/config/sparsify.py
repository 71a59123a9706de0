"""The settings of `minitron sparsify`."""

import re
from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.calibration import CalibrationConfig, Scheme, group_problems
from minitron_megatron.config.checks import at_least

UNSTRUCTURED = "unstructured"
_N_OF_M = re.compile(r"([1-9]\d?):([1-9]\d?)")


class SparsifyMethod(str, Enum):
    """How the weights that stay are chosen, and the others made up for."""

    MAGNITUDE = "magnitude"  # the largest weights; needs no text
    WANDA = "wanda"  # the largest products of weight and input (2306.11695)
    SPARSEGPT = "sparsegpt"  # column by column, on updated weights (2301.00774)
    ALPS = "alps"  # mask and weights together, by ADMM (2406.07831)
    GIVEN = "given"  # the masks of another checkpoint: a lottery ticket's (1803.03635)
    RANDOM = "random"  # chance, with as many zeros in each matrix as masks_of has, if it is given: a control


_WITHOUT_TEXT = (SparsifyMethod.MAGNITUDE, SparsifyMethod.GIVEN, SparsifyMethod.RANDOM)


@dataclass
class SparsifyConfig(CalibrationConfig):
    """`minitron sparsify`: set a share of a checkpoint's weights to zero, layer by layer.

    Attributes:
        pattern: N:M keeps N of every M weights of a row, as in 2:4; unstructured keeps any.
        sparsity: share of zeros of each matrix, for an unstructured pattern.
        sparsity_of: other shares of zeros, by patterns of the names of matrices, as in `{*.mlp.*: 0.6,
            decoder.layers.0.*: 0.3}`; the last pattern that matches a matrix counts.
        by_error: give each layer a share of zeros of its own, within 0.2 of `sparsity`, which is then that of all: the
            smaller, the more predictions change where that layer alone has zeros.
        method: how the weights that stay are chosen.
        masks_of: sparse checkpoint of the same network, whose masks are taken (given) or shuffled (random).
        seed: of random masks.
        refit: refit the weights that stay by least squares; with magnitude and wanda they are else as they were.
        refit_steps: conjugate-gradient steps of the refit.
        scheme: also round the weights that stay; see `quantize`. After a refit that is a second pass over the columns;
            sparsegpt without a refit chooses and rounds in one pass.
        group_size: see `quantize`.
        ignore: matrices to leave as they are, as patterns of their names, such as `*.mlp.linear_fc2.weight` or
            `decoder.layers.0.*`.
    """

    pattern: str = "2:4"
    sparsity: float = 0.5
    sparsity_of: dict = field(default_factory=dict)
    by_error: bool = False
    method: SparsifyMethod = SparsifyMethod.ALPS
    masks_of: str | None = None
    seed: int = 1234
    refit: bool = True
    refit_steps: int = 20
    scheme: Scheme | None = None
    group_size: int | None = None
    ignore: list[str] = field(default_factory=list)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and M of the pattern; None if it is unstructured."""
        match = _N_OF_M.fullmatch(self.pattern)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def needs_inputs(self) -> bool:
        return self.refit or self.scheme is not None or self.method not in _WITHOUT_TEXT

    @property
    def needs_text(self) -> bool:
        return self.needs_inputs or self.by_error

    def problems(self, where: str = "") -> list[str]:
        problems = super().problems(where)
        if self.n_of_m is None and self.pattern != UNSTRUCTURED:
            problems.append(f"{where}pattern = {self.pattern}: must be N:M, such as 2:4, or {UNSTRUCTURED}")
        if self.n_of_m and not self.n_of_m[0] < self.n_of_m[1]:
            problems.append(f"{where}pattern = {self.pattern}: keeps every weight; N must be below M")
        if not 0 < self.sparsity < 1:
            problems.append(f"{where}sparsity = {self.sparsity}: must be above 0 and below 1")
        if self.n_of_m and self.n_of_m[0] < self.n_of_m[1]:
            own = 1 - self.n_of_m[0] / self.n_of_m[1]
            if self.sparsity not in (own, 0.5):
                problems.append(
                    f"{where}sparsity = {self.sparsity}, and {where}pattern = {self.pattern} has {own:.4g}: leave "
                    f"{where}sparsity out, or set {where}pattern={UNSTRUCTURED}"
                )
        if self.sparsity_of and self.pattern != UNSTRUCTURED:
            problems.append(
                f"{where}sparsity_of = {self.sparsity_of}, and {where}pattern = {self.pattern} has one share of zeros: "
                f"set {where}pattern={UNSTRUCTURED}, or leave matrices out with {where}ignore"
            )
        if self.by_error and (self.pattern != UNSTRUCTURED or self.sparsity_of):
            other = f"pattern = {self.pattern}" if self.pattern != UNSTRUCTURED else f"sparsity_of = {self.sparsity_of}"
            problems.append(
                f"{where}by_error = true, and {where}{other} says which share each matrix has: set one of them, with "
                f"{where}pattern={UNSTRUCTURED}"
            )
        if self.by_error and self.method in (SparsifyMethod.GIVEN, SparsifyMethod.RANDOM):
            problems.append(
                f"{where}by_error = true, and {where}method = {self.method.value} does not choose by errors: leave "
                f"{where}by_error out, or set {where}method=alps"
            )
        problems += [
            f"{where}sparsity_of has {glob}: {share!r}: must be a number above 0 and below 1; {where}ignore leaves a "
            f"matrix as it is"
            for glob, share in self.sparsity_of.items()
            if not (isinstance(share, float) and 0 < share < 1)
        ]
        is_given = self.method is SparsifyMethod.GIVEN
        if (self.masks_of is None) if is_given else (self.masks_of and self.method is not SparsifyMethod.RANDOM):
            problems.append(
                f"{where}masks_of = {self.masks_of} and {where}method = {self.method.value}: given needs a checkpoint "
                f"with masks, random may have one, and no other method has"
            )
        defaults = {"pattern": "2:4", "sparsity": 0.5, "sparsity_of": {}, "by_error": False}
        if others := [name for name, value in defaults.items() if self.masks_of and getattr(self, name) != value]:
            problems.append(
                f"{where}masks_of = {self.masks_of} says which weights are zero: leave out "
                f"{' and '.join(where + name for name in others)}"
            )
        problems += group_problems(where, self.scheme, self.group_size)
        return problems + at_least(where, "refit_steps", self.refit_steps, 1)
