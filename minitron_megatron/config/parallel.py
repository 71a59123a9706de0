"""How ranks are laid out: what each verb has a use for, so that none takes a setting that it ignores."""

from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.checks import at_least


class Builder(str, Enum):
    """The class of Megatron-Core that builds a network."""

    GPT = "gpt"
    HYBRID = "hybrid"


@dataclass
class ModelParallelConfig:
    """How ranks share one network.

    Attributes:
        tensor: ranks that share every layer's matrices.
        pipeline: ranks that share the list of layers.
        builder: class of Megatron-Core that builds networks, GPTModel or HybridModel (from 0.18 on); both give the same
            numbers and checkpoints. null: GPTModel, and HybridModel for what GPTModel cannot express.
    """

    tensor: int = 1
    pipeline: int = 1
    builder: Builder | None = field(default=None, kw_only=True)

    def problems(self, where: str = "parallel.") -> list[str]:
        """What is wrong with the settings by themselves."""
        return [*at_least(where, "tensor", self.tensor, 1), *at_least(where, "pipeline", self.pipeline, 1)]


@dataclass
class InferenceParallelConfig(ModelParallelConfig):
    """How ranks run a network forward.

    Attributes:
        data: replicas; null means all that the world has (one, when started by hand).
        timeout_min: ranks that wait for each other for so many minutes are ended, with their stacks in the log.
    """

    data: int | None = None
    timeout_min: float = field(default=30.0, kw_only=True)

    def problems(self, where: str = "parallel.") -> list[str]:
        problems = [*super().problems(where), *at_least(where, "data", self.data, 1)]
        if self.timeout_min <= 0:
            problems.append(f"{where}timeout_min = {self.timeout_min}: must be above 0")
        return problems


@dataclass
class TargetParallelConfig(ModelParallelConfig):
    """The layout that a network is meant for, as far as it says what its sizes must divide by.

    Attributes:
        virtual_pipeline: stages per pipeline rank (interleaved schedule); null for the plain one.
    """

    virtual_pipeline: int | None = None

    def problems(self, where: str = "parallel.") -> list[str]:
        problems = [*super().problems(where), *at_least(where, "virtual_pipeline", self.virtual_pipeline, 2)]
        if self.virtual_pipeline and self.pipeline < 2:
            problems.append(
                f"{where}virtual_pipeline = {self.virtual_pipeline} needs {where}pipeline of at least 2, "
                f"not {self.pipeline}: raise the one or set the other to null"
            )
        return problems


@dataclass
class ParallelConfig(TargetParallelConfig, InferenceParallelConfig):
    """How ranks train a network, or score it.

    Attributes:
        sequence: sequence parallelism; norms and residuals are split over the tensor ranks.
    """

    sequence: bool = False

    def problems(self, where: str = "parallel.") -> list[str]:
        problems = super().problems(where)
        if self.sequence and self.tensor < 2:
            problems.append(
                f"{where}sequence = true needs {where}tensor of at least 2, not {self.tensor}: "
                f"raise {where}tensor or switch sequence parallelism off"
            )
        return problems
