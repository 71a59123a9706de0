"""The numbers that weights are rounded to: integers or 8-bit floats times a scale.

Scales and ranges are those of compressed-tensors, which serving engines read: a symmetric range of 2^bits steps, the
scale half of it to the largest weight. Rounded weights would give other scales, so scales are kept beside them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.config.calibration import GROUPS, NOT_SERVED, Scheme, is_served
from minitron_megatron.errors import raise_if_any
from minitron_megatron.model.axes import Param

logger = logging.getLogger(__name__)

_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Grid:
    """The numbers that the weights of a scheme may have.

    Attributes:
        scheme: of the weights.
        group: columns that share a scale.
    """

    scheme: Scheme
    group: int

    @classmethod
    def of(cls, scheme: Scheme, columns: int, group: int | None = None) -> "Grid":
        """Returns the grid of a matrix.

        Args:
            scheme: of the weights.
            columns: of the matrix.
            group: columns that share a scale, for w4a16; None for the largest of `GROUPS` that divides.
        """
        if scheme is not Scheme.W4A16:
            return cls(scheme, columns)
        return cls(scheme, group or next((size for size in GROUPS if columns % size == 0), columns))

    @property
    def bits(self) -> int:
        return 4 if self.scheme is Scheme.W4A16 else 8

    def scales(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the scales of `[rows, columns]`, `[rows, groups]` in float32.

        Args:
            weight: the weights.
            dtype: 16-bit format to which scales are rounded, because they are served in it.
        """
        largest = weight.unflatten(1, (-1, self.group)).abs().amax(2)
        top = torch.finfo(_FP8).max if self.scheme is Scheme.FP8 else (2**self.bits - 1) / 2
        scales = (largest / top).to(dtype).float()
        return torch.where(scales > 0, scales, 1.0)  # of a group of zeros

    def round(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Rounds weights to the grid.

        Args:
            weight: of any shape.
            scale: of each weight.
        """
        return self.codes(weight, scale).float() * scale

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Returns the rounded weights in units of their scales: int8, or 8-bit floats."""
        if self.scheme is Scheme.FP8:
            top = torch.finfo(_FP8).max
            return (weight / scale).clamp(-top, top).to(_FP8)
        top = 2 ** (self.bits - 1)
        return (weight / scale).round().clamp(-top, top - 1).to(torch.int8)

    def spread(self, scales: Tensor) -> Tensor:
        """Returns the scale of every weight, `[rows, columns]`, from those of groups."""
        return scales.repeat_interleave(self.group, dim=1)


def scale_dtype(source: TensorSource) -> torch.dtype:
    """Returns the number format of scales, which are served in that of the weights; bf16 for fp32."""
    return torch.bfloat16 if source.dtype is torch.float32 else source.dtype


def grids_of(chosen: Sequence[Param], scheme: Scheme, group: int | None) -> dict[Param, Grid]:
    """Returns the grid of every matrix, and warns of one that packed weights are not read in.

    Args:
        chosen: the matrices.
        scheme: of the weights.
        group: columns that share a scale; None for the default.

    Raises:
        ConfigError: the group size does not divide the columns of a matrix.
    """
    raise_if_any(group_problems(chosen, group))
    grids = {param: Grid.of(scheme, param.shape[1], group) for param in chosen}
    if any(not is_served(grid.group, param.shape[1]) for param, grid in grids.items()):
        logger.warning("group_size = %d: %s; export will want packed=false", group, NOT_SERVED)
    return grids


def group_problems(chosen: Sequence[Param], group: int | None) -> list[str]:
    """Returns which matrices a group size does not divide, one sentence for each name."""
    wrong = {param.name: param.shape[1] for param in chosen if group and param.shape[1] % group}
    return [
        f"group_size = {group} does not divide the {columns} columns of {name}: choose "
        f"{', '.join(str(size) for size in GROUPS if columns % size == 0) or columns}, or leave it out with "
        f"ignore=[*.{name}]"
        for name, columns in wrong.items()
    ]
