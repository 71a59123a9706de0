"""The settings of `minitron score`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from minitron_megatron.config.axes import scored_axes, sublayers
from minitron_megatron.config.checks import at_least
from minitron_megatron.config.common import DataConfig, DType, sequence_problems
from minitron_megatron.config.fields import OPEN, SAME_RESULT, OpenField, OpenSettings
from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.config.plugins import PluginConfig
from minitron_megatron.config.target import TargetConfig


class Aggregation(str, Enum):
    """How several scores are aggregated to one (Minitron, 2407.14679, section 2.2)."""

    MEAN = "mean"  # mean of absolute values
    L2 = "l2"
    VARIANCE = "variance"


class Criterion(str, Enum):
    """How the importance of a channel, a neuron or a head is measured."""

    ACTIVATION = "activation"
    ACTIVATION_WEIGHT = "activation_weight"
    WEIGHT = "weight"
    RANDOM = "random"


class Neurons(str, Enum):
    """Where the activations of MLP neurons are taken."""

    AFTER = "after"
    BEFORE = "before"


class DepthCriterion(str, Enum):
    """What is measured when layers are skipped; more is worse."""

    BLOCK_INFLUENCE = "block_influence"  # 1 - cos(x_in, x_out) of the skipped layers
    LOSS = "loss"  # increase of the loss on the text
    KL = "kl"  # KL(whole network || without the layers) of the predictions
    LOGITS = "logits"  # squared change of the logits, relative to their square
    ACCURACY = "accuracy"  # decrease of the accuracy on multiple-choice questions


class DepthSearch(str, Enum):
    SINGLE = "single"
    BLOCK = "block"
    GREEDY = "greedy"


class Unit(str, Enum):
    LAYER = "layer"
    SUBLAYER = "sublayer"


@dataclass
class DepthConfig:
    """How the layers of a network are scored.

    Attributes:
        criteria: what to measure when a layer is skipped; several cost little more than one. The first decides a
            greedy search.
        unit: score transformer layers, or attention and MLP sublayers separately.
        search: single skips each unit by itself, block skips every contiguous block of as many layers as the target
            drops, greedy drops one unit after another, each time the least important.
        protect_first: number of leading layers that are never pruned.
        protect_last: number of trailing layers that are never pruned.
        choices: JSON-lines file of multiple-choice questions (context, choices, answer), for accuracy.
    """

    criteria: list[DepthCriterion] = field(default_factory=lambda: [DepthCriterion.BLOCK_INFLUENCE])
    unit: Unit = Unit.LAYER
    search: DepthSearch = DepthSearch.SINGLE
    protect_first: int = 1
    protect_last: int = 1
    choices: str | None = field(default=None, metadata=SAME_RESULT)  # its content is identified by a fingerprint

    def problems(self, where: str = "depth.") -> list[str]:
        problems = []
        for name in ("protect_first", "protect_last"):
            problems += at_least(where, name, getattr(self, name), 0)
        if len(set(self.criteria)) < len(self.criteria):
            problems.append(f"{where}criteria = {[c.value for c in self.criteria]}: names one twice")
        if self.search is not DepthSearch.SINGLE and not self.criteria:
            problems.append(f"{where}search = {self.search.value} needs at least one of {where}criteria")
        if (DepthCriterion.ACCURACY in self.criteria) != (self.choices is not None):
            problems.append(
                f"{where}choices = {self.choices} and accuracy in {where}criteria belong together: set both or neither"
            )
        if self.search is DepthSearch.BLOCK and self.unit is Unit.SUBLAYER:
            problems.append(f"{where}search = block skips whole layers: set {where}unit=layer")
        return problems


@dataclass
class AxisConfig:
    """Overrides for the scoring of one axis; null uses the setting for all axes.

    Attributes:
        criterion: criterion of this axis.
        sequence_aggregation: aggregation over tokens, of this axis.
        batch_aggregation: aggregation over sequences, of this axis.
    """

    criterion: Criterion | None = None
    sequence_aggregation: Aggregation | None = None
    batch_aggregation: Aggregation | None = None


@dataclass(frozen=True)
class AxisScoring:
    """How one axis is scored: its overrides, and the settings for all axes where it has none."""

    criterion: Criterion
    sequence_aggregation: Aggregation
    batch_aggregation: Aggregation


@dataclass(init=False)
class ScoreConfig(OpenSettings, PluginConfig):
    """`minitron score`: score the importance of channels, neurons, heads and layers on a calibration set.

    Attributes:
        checkpoint: checkpoint to score.
        output: folder for `scores.safetensors`.
        num_samples: calibration sequences over all ranks.
        micro_batch: sequences per forward pass and rank.
        criterion: importance of channels, neurons and heads: their activations; activations times the norm of the
            weights that read them; the norm of all their weights; or random scores, as a baseline.
        sequence_aggregation: aggregation over the tokens of a sequence, applied first.
        batch_aggregation: aggregation over the calibration sequences, applied second.
        by_axis: the same three for a single axis: a section for every scored axis, under its name in `target`.
        neurons: score neurons after their activation and gate, or before (the gate's input, if the MLP is gated).
        rounds: alternate scoring and pruning in this many rounds on the way to the target.
        save_rounds: also write the checkpoints between rounds, to `OUTPUT.round_N/`.
        save_every: micro-batches between saves of the partial sums, from which an interrupted run resumes.
        seed: seed of random scores.
        dtype: number format of weights and computation.
        target: final shape, for several rounds and for block and greedy searches.
    """

    checkpoint: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    num_samples: int = 1024
    micro_batch: int = field(default=4, metadata=SAME_RESULT)
    criterion: Criterion = Criterion.ACTIVATION
    sequence_aggregation: Aggregation = Aggregation.MEAN
    batch_aggregation: Aggregation = Aggregation.L2
    by_axis: dict[str, Any] = field(default_factory=dict, metadata=OPEN)  # of `AxisConfig`
    neurons: Neurons = Neurons.AFTER
    rounds: int = 1
    save_rounds: bool = field(default=False, metadata=SAME_RESULT)
    save_every: int = field(default=64, metadata=SAME_RESULT)
    seed: int = 1234
    dtype: DType = DType.BF16
    depth: DepthConfig = field(default_factory=DepthConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=SAME_RESULT)

    @classmethod
    def open_fields(cls) -> dict[str, OpenField]:
        """Returns a section for every scored axis."""
        return {name: OpenField(AxisConfig) for name in scored_axes()}

    @property
    def depends_on_target(self) -> bool:
        """Whether the scores depend on the target."""
        return self.rounds > 1 or self.depth.search is not DepthSearch.SINGLE

    @property
    def axes(self) -> dict[str, AxisScoring]:
        """How each axis is scored, by its name in `target`."""

        def complete(own: AxisConfig) -> AxisScoring:
            return AxisScoring(
                own.criterion or self.criterion,
                own.sequence_aggregation or self.sequence_aggregation,
                own.batch_aggregation or self.batch_aggregation,
            )

        return {name: complete(self.by_axis.get(name, AxisConfig())) for name in scored_axes()}

    def problems(self, where: str = "") -> list[str]:
        problems = []
        for name in ("num_samples", "micro_batch", "rounds", "save_every"):
            problems += at_least(where, name, getattr(self, name), 1)
        problems += at_least(where, "seed", self.seed, 0)
        for part in ("depth", "target", "data", "parallel"):
            problems += getattr(self, part).problems(f"{where}{part}.")
        problems += sequence_problems(where, self.data, self.parallel)
        if self.num_samples < 2 and Aggregation.VARIANCE in [a.batch_aggregation for a in self.axes.values()]:
            problems.append(f"{where}num_samples = {self.num_samples}: a variance over sequences needs at least 2")
        if self.save_rounds and self.rounds < 2:
            problems.append(
                f"{where}save_rounds = true, and {where}rounds = {self.rounds} has none in between: leave it out"
            )
        if not self.depends_on_target and not self.target.is_empty:
            problems.append(
                f"{where}target has no effect on scores of one round: leave it out here and give it to prune, or set "
                f"{where}rounds or {where}depth.search"
            )
        if self.rounds > 1 and self.target.is_empty:
            problems.append(f"{where}rounds = {self.rounds} need a shape to head for: set {where}target")
        if self.rounds > 1 and self.depth.search is not DepthSearch.SINGLE:
            problems.append(
                f"{where}rounds = {self.rounds} and {where}depth.search = {self.depth.search.value}: several rounds "
                f"score every layer by itself; set {where}depth.search=single or {where}rounds=1"
            )
        if self.rounds > 1 and self.target.layers is not None and not self.depth.criteria:
            problems.append(f"{where}target.layers and {where}rounds = {self.rounds} need one of {where}depth.criteria")
        if self.rounds > 1 and (self.depth.unit is Unit.SUBLAYER or self.target.sublayers):
            problems.append(
                f"{where}rounds = {self.rounds} score networks of whole layers: set {where}depth.unit=layer and "
                f"{where}target.layers, or {where}rounds=1"
            )
        by_layer = self.depth.unit is Unit.LAYER
        goes = self.target.layers is not None if by_layer else bool(self.target.sublayers)
        if self.depth.search is not DepthSearch.SINGLE and not goes:
            going = ["layers"] if by_layer else sublayers()
            problems.append(
                f"{where}depth.search = {self.depth.search.value} needs to know how many go: set "
                f"{' or '.join(f'{where}target.{name}' for name in going)}"
            )
        return problems
