"""Parallel layouts: a class for each use, so that no verb takes a setting that it ignores."""

from dataclasses import dataclass, field, fields
from enum import Enum

from minitron_megatron.config.checks import at_least
from minitron_megatron.errors import raise_if_any


class Builder(str, Enum):
    """The model class of Megatron-Core that builds a network."""

    GPT = "gpt"
    HYBRID = "hybrid"


@dataclass
class ModelParallelConfig:
    """Model parallelism.

    Attributes:
        tensor: tensor-parallel ranks.
        pipeline: pipeline-parallel ranks.
        builder: model class of Megatron-Core: GPTModel or HybridModel (0.18 or newer), with the same results and
            checkpoints. null: GPTModel, or HybridModel for networks that GPTModel cannot express.
    """

    tensor: int = 1
    pipeline: int = 1
    builder: Builder | None = field(default=None, kw_only=True)

    @property
    def stages(self) -> int:
        """Pipeline stages over all ranks, virtual ones included."""
        return self.pipeline

    def problems(self, where: str = "parallel.") -> list[str]:
        """Returns what is wrong with the settings, one sentence each."""
        return [*at_least(where, "tensor", self.tensor, 1), *at_least(where, "pipeline", self.pipeline, 1)]


@dataclass
class DataParallelConfig:
    """The layout for work in which every rank has whole layers.

    Attributes:
        data: data-parallel replicas; null for as many as the ranks allow, or one where no launcher started any.
        timeout_min: abort after this many minutes without progress; every rank's stack goes to the log.
    """

    data: int | None = None
    timeout_min: float = field(default=30.0, kw_only=True)

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica."""
        return 1

    def in_world(self, num_ranks: int) -> "ParallelConfig":
        """Returns the layout for a world of `num_ranks`, with its number of replicas.

        Raises:
            ConfigError: the world has another size than the layout.
        """
        data = self.data or max(1, num_ranks // self.model_ranks)
        needed = self.model_ranks * data
        problem = (
            f"{self._show(data)} = {needed} ranks, but the world has {num_ranks}: start {needed} ranks or change the "
            f"layout"
        )
        raise_if_any([problem] if needed != num_ranks else [])
        own = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return ParallelConfig(**{**own, "data": data})

    def _show(self, data: int) -> str:
        return f"parallel.data = {data}"

    def problems(self, where: str = "parallel.") -> list[str]:
        """Returns what is wrong with the settings, one sentence each."""
        problems = at_least(where, "data", self.data, 1)
        if self.timeout_min <= 0:
            problems.append(f"{where}timeout_min = {self.timeout_min}: must be above 0")
        return problems


@dataclass
class InferenceParallelConfig(DataParallelConfig, ModelParallelConfig):
    """The layout for inference."""

    @property
    def model_ranks(self) -> int:
        return self.tensor * self.pipeline

    def _show(self, data: int) -> str:
        return f"parallel.tensor x pipeline x data = {self.tensor} x {self.pipeline} x {data}"

    def problems(self, where: str = "parallel.") -> list[str]:
        return [*ModelParallelConfig.problems(self, where), *DataParallelConfig.problems(self, where)]


@dataclass
class TargetParallelConfig(ModelParallelConfig):
    """The part of a layout that determines what the sizes of a network must divide by.

    Attributes:
        virtual_pipeline: virtual pipeline stages per rank (interleaved schedule); null for the plain 1F1B schedule.
    """

    virtual_pipeline: int | None = None

    @property
    def model_chunks(self) -> int:
        """Virtual stages per pipeline rank."""
        return self.virtual_pipeline or 1

    @property
    def stages(self) -> int:
        return self.pipeline * self.model_chunks

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
    """The layout for training and scoring.

    Attributes:
        sequence: sequence parallelism: split norms and residual stream over the tensor ranks.
    """

    sequence: bool = False

    @property
    def replicas(self) -> int:
        """Data-parallel ranks; 1 until `in_world` has set them."""
        return self.data or 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.replicas

    def problems(self, where: str = "parallel.") -> list[str]:
        problems = super().problems(where)
        if self.sequence and self.tensor < 2:
            problems.append(
                f"{where}sequence = true needs {where}tensor of at least 2, not {self.tensor}: "
                f"raise {where}tensor or switch sequence parallelism off"
            )
        return problems
