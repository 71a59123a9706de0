"""Settings of the verbs that work through a network layer by layer."""

from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.checks import at_least
from minitron_megatron.config.common import DataConfig, DType
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.parallel import DataParallelConfig
from minitron_megatron.config.plugins import PluginConfig


class Scheme(str, Enum):
    """What is rounded, as serving engines call it: bits of weights (w) and of activations (a)."""

    W4A16 = "w4a16"  # 4-bit integers, a scale for a group of columns
    W8A8 = "w8a8"  # 8-bit integers, a scale for each row; activations by token, when served
    FP8 = "fp8"  # 8-bit floats (e4m3), a scale for each row; activations by token, when served


GROUPS = (128, 64, 32)
"""Group sizes that readers of packed weights have kernels for, the preferred first."""

NOT_SERVED = f"readers of packed weights know groups of {', '.join(map(str, GROUPS))} columns and whole rows"


def is_served(group: int, columns: int) -> bool:
    """Returns whether readers of packed weights know a group size in rows of so many columns."""
    return group in (*GROUPS, columns)


@dataclass
class CalibrationConfig(PluginConfig):
    """What verbs share that work through a network layer by layer, on the inputs of its matrices.

    Attributes:
        checkpoint: checkpoint to work on; it is not changed.
        output: folder of the checkpoint to write.
        num_samples: calibration sequences over all ranks.
        micro_batch: sequences per forward pass.
        sequential: give each layer the outputs of the layers before it as they have become, so that it makes up for
            their errors; else those of the network as it was.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        most_norms: let no token's input count for more than this many times the median norm of its micro-batch; null
            for no limit.
        by_activation: decide the columns of a matrix in the order of their inputs' second moments, the largest first.
        moments_gb: measure the inputs of a layer's matrices in several runs of it, the widest first, where their second
            moments would take more than this many 10^9 bytes; those of one matrix may.
        states_gb: keep hidden states of more than this many 10^9 bytes per rank in a file beside the output.
        dtype: number format in which layers run; solving is in fp32.
        parallel: ranks, each of which has its own share of the calibration set.
    """

    checkpoint: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    num_samples: int = 128
    micro_batch: int = 4
    sequential: bool = True
    damping: float = 0.01
    most_norms: float | None = None
    by_activation: bool = True
    moments_gb: float = field(default=1.0, metadata=SAME_RESULT)
    states_gb: float = field(default=8.0, metadata=SAME_RESULT)
    dtype: DType = DType.BF16
    data: DataConfig = field(default_factory=DataConfig)
    parallel: DataParallelConfig = field(default_factory=DataParallelConfig, metadata=SAME_RESULT)

    @property
    def needs_inputs(self) -> bool:
        """Whether the inputs of matrices are measured."""
        raise NotImplementedError

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured."""
        return self.needs_inputs

    def problems(self, where: str = "") -> list[str]:
        problems = at_least(where, "num_samples", self.num_samples, 1)
        problems += at_least(where, "micro_batch", self.micro_batch, 1)
        if not 0 < self.damping < 1:
            problems.append(f"{where}damping = {self.damping}: must be above 0 and below 1; 0.01 and 0.1 are usual")
        if self.most_norms is not None and self.most_norms < 1:
            problems.append(f"{where}most_norms = {self.most_norms}: must be at least 1, or null for no limit")
        problems += at_least(where, "moments_gb", self.moments_gb, 0)
        problems += at_least(where, "states_gb", self.states_gb, 0)
        return [
            *problems,
            *self.data.problems(f"{where}data."),
            *self.parallel.problems(f"{where}parallel."),
        ]


def group_problems(where: str, scheme: Scheme | None, group_size: int | None) -> list[str]:
    """Returns what is wrong with a group size, one sentence each."""
    problems = at_least(where, "group_size", group_size, 1)
    if group_size is not None and scheme is not Scheme.W4A16:
        why = f"{where}scheme = {scheme.value} has a scale for each row" if scheme else f"{where}scheme = null"
        problems.append(f"{where}group_size = {group_size}, and {why}: leave {where}group_size out")
    return problems
