"""The settings of `minitron distill`."""

import re
from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.calibration import Scheme, group_problems
from minitron_megatron.config.checks import at_least, nearest_multiples
from minitron_megatron.config.common import DataConfig, DType, sequence_problems
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.config.plugins import PluginConfig
from minitron_megatron.config.teachers import TeacherConfig


class Tracker(str, Enum):
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"


class Decay(str, Enum):
    """How the learning rate gets from its peak, which the warm-up ends at, to `min_lr`, at the last step."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"  # it stays at the peak
    WSD = "wsd"  # it stays at the peak and decays linearly in the last `decay_steps`


class MaskMode(str, Enum):
    """What becomes of the masks of a sparse student."""

    KEEP = "keep"  # what is zero stays zero
    IGNORE = "ignore"  # every weight is trained; the result has no masks


class MaskScore(str, Enum):
    """Which weights are dropped first while training."""

    MAGNITUDE = "magnitude"  # the smallest of a matrix
    ACTIVATION = "activation"  # of each row, the smallest products with the norms of inputs that `sparsify` has saved


@dataclass
class MasksConfig:
    """What training does to zeros: those of a sparse student, or those that it makes.

    Attributes:
        mode: keep what is zero in a sparse student at zero, or train every weight.
        sparsity: make every matrix of the layers sparser while training, up to this share of zeros; null for no more
            zeros than there are.
        first_step: step at which the first weights are dropped.
        last_step: step from which on no more are dropped.
        every: steps between two rounds of dropping. In between the share rises with the cube of the time that is left
            (Zhu and Gupta, 1710.01878).
        by: which weights a round drops.
    """

    mode: MaskMode = MaskMode.KEEP
    sparsity: float | None = None
    first_step: int = 1
    last_step: int | None = None
    every: int = 10
    by: MaskScore = MaskScore.MAGNITUDE

    def problems(self, steps: int, where: str = "masks.") -> list[str]:
        """Returns what is wrong with the settings of a run of so many steps, one sentence each."""
        problems = [*at_least(where, "first_step", self.first_step, 1), *at_least(where, "every", self.every, 1)]
        if self.sparsity is None:
            return problems + [
                f"{where}{name} = {getattr(self, name)}, and {where}sparsity = null: set both or neither"
                for name, default in {
                    "first_step": 1,
                    "last_step": None,
                    "every": 10,
                    "by": MaskScore.MAGNITUDE,
                }.items()
                if getattr(self, name) != default
            ]
        if not 0 < self.sparsity < 1:
            problems.append(f"{where}sparsity = {self.sparsity}: must be above 0 and below 1")
        if self.mode is MaskMode.IGNORE:
            problems.append(
                f"{where}sparsity = {self.sparsity}, and {where}mode = ignore keeps no zeros: set it to keep"
            )
        if self.last_step is None or not self.first_step <= self.last_step <= steps:
            problems.append(
                f"{where}last_step = {self.last_step}: must be from {where}first_step = {self.first_step} to steps = "
                f"{steps}; leave the last steps for what is left to recover"
            )
        return problems


@dataclass
class FakeQuantConfig:
    """Quantisation-aware training: the forward pass has rounded weights, and the optimiser updates them as they are.

    Attributes:
        scheme: what the matrices of the layers are rounded to; null for no rounding. `export` packs the result.
        group_size: columns that share a scale, for w4a16; see `quantize`.
    """

    scheme: Scheme | None = None
    group_size: int | None = None

    def problems(self, dtype: DType, where: str = "fake_quant.") -> list[str]:
        """Returns what is wrong with the settings of a run in a number format, one sentence each."""
        problems = group_problems(where, self.scheme, self.group_size)
        if self.scheme is not None and dtype is not DType.BF16:
            problems.append(
                f"{where}scheme = {self.scheme.value}, and dtype = {dtype.value} has no weights to update beside the "
                f"rounded ones: set dtype=bf16"
            )
        return problems


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and decay of the learning rate.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the last step; not for a constant one.
        warmup_steps: steps of linear warm-up.
        decay: how the learning rate goes down after the warm-up.
        decay_steps: steps of the decay, for wsd.
        weight_decay: decoupled weight decay of matrices; norms and biases have none.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the denominator for numerical stability.
        clip_grad: clip the gradient to this global L2 norm; 0 disables clipping.
        distributed: use Megatron's distributed optimizer, which shards optimiser state over the replicas.
        overlap: overlap the gradient reduction over replicas with the backward pass.
    """

    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 40
    decay: Decay = Decay.COSINE
    decay_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    distributed: bool = False
    overlap: bool = field(default=False, metadata=SAME_RESULT)

    def problems(self, where: str = "optimizer.") -> list[str]:
        problems = []
        for name in ("min_lr", "warmup_steps", "weight_decay", "clip_grad"):
            problems += at_least(where, name, getattr(self, name), 0)
        if self.lr <= 0 or self.min_lr > self.lr:
            problems.append(f"{where}lr = {self.lr} must be above 0 and at least {where}min_lr = {self.min_lr}")
        if (self.decay is Decay.WSD) != (self.decay_steps is not None):
            problems.append(
                f"{where}decay = {self.decay.value} and {where}decay_steps = {self.decay_steps}: wsd needs "
                f"{where}decay_steps, and nothing else has them"
            )
        return problems + at_least(where, "decay_steps", self.decay_steps, 1)


@dataclass
class TrackingConfig:
    """Where metrics go in addition to `metrics.jsonl`, which is always written.

    Attributes:
        trackers: Weights & Biases, TensorBoard, or both.
        project: W&B project.
        name: W&B run name; null for the name of the output folder.
        mode: W&B mode: online sends metrics as they come, offline keeps them for `wandb sync`, disabled does neither.
        timeout_s: seconds to wait for the W&B server at the start, where a timeout is an error, and at the end.
    """

    trackers: list[Tracker] = field(default_factory=list)
    project: str = "minitron_megatron"
    name: str | None = None
    mode: str = "online"
    timeout_s: float = 60.0

    def problems(self, where: str = "tracking.") -> list[str]:
        problems = []
        if len(set(self.trackers)) < len(self.trackers):
            names = ", ".join(tracker.value for tracker in self.trackers)
            problems.append(f"{where}trackers = [{names}]: name each once")
        if self.mode not in ("online", "offline", "disabled"):
            problems.append(f"{where}mode = {self.mode!r}: must be online, offline or disabled")
        return [*problems, *at_least(where, "timeout_s", self.timeout_s, 1)]


@dataclass
class DistillConfig(PluginConfig):
    """`minitron distill`: train a student to match its teacher's predictions.

    Attributes:
        teacher: checkpoint of the teacher, or a cache of its predictions; null trains on the text alone.
        student: checkpoint to start from.
        output: folder for the trained checkpoint and its metrics.
        steps: optimiser steps.
        global_batch: sequences per step over all ranks.
        micro_batch: sequences per forward pass and rank.
        recompute: save memory by keeping only each layer's input and recomputing the layer in the backward pass; also
            of a teacher that is trained.
        random_init: start the student from random weights of the same shape (a control).
        save_every: steps between checkpoints; null saves only at the end.
        validate_every: steps between held-out losses; null for none.
        validate_batches: global batches of held-out text per validation.
        keep_checkpoints: number of latest checkpoints to keep. With validation, the one with the lowest held-out loss
            is kept as well, in `OUTPUT/best`.
        max_skipped_steps: stop after this many steps in a row with a loss or gradient that is not finite, or without a
            token to learn from.
        dtype: number format of weights and computation; bf16 has fp32 main weights.
        teacher_dtype: number format of the teacher; null for that of its checkpoint.
        teacher_fp8: run the teacher's matrix products in FP8; needs CUDA and Transformer Engine.
        teacher_lr: also train the teacher, by cross-entropy on the same batches, with this peak learning rate and
            otherwise the settings of `optimizer` (parallel teacher correction; 2408.11796, section 2.1). null freezes
            the teacher.
        teachers: several instead of one `teacher`, by names that you choose, as in
            {large:{teacher:A,last_step:500},small:{teacher:B,first_step:400,weight:0.5}}: the weight of each, and the
            steps in which it teaches. Only those that teach are in memory.
        seed: seed of random weights.
    """

    teacher: str | None = "???"
    student: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    steps: int = 400
    global_batch: int = 8
    micro_batch: int = field(default=4, metadata=SAME_RESULT)
    recompute: bool = field(default=False, metadata=SAME_RESULT)
    random_init: bool = False
    save_every: int | None = field(default=100, metadata=SAME_RESULT)
    validate_every: int | None = field(default=None, metadata=SAME_RESULT)
    validate_batches: int = field(default=4, metadata=SAME_RESULT)
    keep_checkpoints: int = field(default=1, metadata=SAME_RESULT)
    max_skipped_steps: int = field(default=10, metadata=SAME_RESULT)
    dtype: DType = DType.BF16
    teacher_dtype: DType | None = None
    teacher_fp8: bool = False
    teacher_lr: float | None = None
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    seed: int = 1234
    loss: LossConfig = field(default_factory=LossConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    fake_quant: FakeQuantConfig = field(default_factory=FakeQuantConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=SAME_RESULT)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=SAME_RESULT)

    def problems(self, where: str = "") -> list[str]:
        problems = []
        counts = ("steps", "global_batch", "micro_batch", "save_every", "validate_every", "validate_batches")
        for name in (*counts, "keep_checkpoints", "max_skipped_steps"):
            problems += at_least(where, name, getattr(self, name), 1)
        for part in ("loss", "optimizer", "data", "parallel", "tracking"):
            problems += getattr(self, part).problems(f"{where}{part}.")
        problems += self.masks.problems(self.steps, f"{where}masks.")
        problems += self.fake_quant.problems(self.dtype, f"{where}fake_quant.")
        problems += sequence_problems(where, self.data, self.parallel)
        problems += self._teacher_problems(where)
        for name, weight in self.loss.teacher_weights.items() if not self.all_teachers else ():
            if weight:
                problems.append(
                    f"{where}teacher = null, but {where}loss.{name} = {weight}: "
                    f"name a teacher, or set the weight to 0 and {where}loss.lm_weight to 1"
                )
        if not self.all_teachers and (self.teacher_fp8 or self.teacher_dtype):
            problems.append(
                f"{where}teacher = null, and {where}{'teacher_fp8' if self.teacher_fp8 else 'teacher_dtype'} is for a "
                f"teacher: leave it out, or name one"
            )
        if self.teacher_lr is not None:
            if self.teacher_lr <= 0:
                problems.append(f"{where}teacher_lr = {self.teacher_lr}: must be above 0, or null for a frozen teacher")
            if self.teacher is None:
                problems.append(
                    f"{where}teacher_lr = {self.teacher_lr}, but {where}teacher = null: set both or neither"
                )
            elif not self.loss.needs_teacher:
                problems.append(
                    f"{where}teacher_lr = {self.teacher_lr} trains a teacher that no loss uses: set "
                    f"{where}loss.kd_logits_weight above 0, or {where}teacher_lr to null"
                )
            if self.teacher_fp8 or self.teacher_dtype is DType.FP16:
                problems.append(
                    f"{where}teacher_lr = {self.teacher_lr} trains the teacher, which needs bf16 or fp32: change "
                    f"{where}{'teacher_fp8' if self.teacher_fp8 else 'teacher_dtype'}"
                )
        for name, schedule in self.loss.schedules.items():
            if schedule.last_step > self.steps:
                problems.append(
                    f"{where}loss.schedule.{name}.points has step {schedule.last_step}, and {where}steps = "
                    f"{self.steps}: end at {self.steps} or before"
                )
        if self.dtype is DType.FP16:
            problems.append(f"{where}dtype = fp16: training needs bf16 or fp32, whose gradients do not underflow")
        if not problems:
            problems += self.batch_problems(self.parallel.data or 1, where)
        if self.optimizer.warmup_steps >= self.steps:
            problems.append(
                f"{where}optimizer.warmup_steps = {self.optimizer.warmup_steps} must be below {where}steps = "
                f"{self.steps}: set it to {self.steps // 10}"
            )
        if (decay := self.optimizer.decay_steps) and decay > self.steps - self.optimizer.warmup_steps:
            problems.append(
                f"{where}optimizer.decay_steps = {decay}, and {where}steps = {self.steps} less "
                f"{where}optimizer.warmup_steps are fewer: set it to {self.steps // 10}"
            )
        return problems

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by name: that of `teacher`, whose name is empty, or those of `teachers`."""
        return self.teachers if self.teacher is None else {"": TeacherConfig(self.teacher)}

    def _teacher_problems(self, where: str) -> list[str]:
        """Returns what is wrong with several teachers, one sentence each."""
        if not self.teachers:
            return []
        problems = []
        for name, own in self.teachers.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                problems.append(f"{where}teachers has the name {name!r}: use letters, digits, '_', '-' and '.'")
            problems += own.problems(self.steps, f"{where}teachers.{name}.")
        if self.teacher is not None:
            problems.append(
                f"{where}teacher = {self.teacher}, and {where}teachers names {', '.join(self.teachers)}: set "
                f"{where}teacher=null, and name all of them in {where}teachers"
            )
        of_one = {"teacher_lr": self.teacher_lr, "loss.hidden.weight": self.loss.largest.hidden.weight}
        problems += [
            f"{where}{name} = {value} is for one teacher, and {where}teachers names {len(self.teachers)}: leave it "
            f"out, or name one as {where}teacher"
            for name, value in of_one.items()
            if value
        ]
        ends = (own.last_step + 1 for own in self.teachers.values() if own.last_step is not None)
        without = [
            step
            for step in sorted({1, *ends})
            if step <= self.steps and not any(own.teaches_at(step) for own in self.teachers.values())
        ]
        if without and not problems:
            problems.append(
                f"{where}teachers leaves step {without[0]} without a teacher: change first_step or last_step of one"
            )
        return problems

    def batch_problems(self, data: int, where: str = "") -> list[str]:
        """Returns why `data` replicas cannot share a batch."""
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
