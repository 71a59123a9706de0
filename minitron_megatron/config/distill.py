"""The settings of `minitron distill`."""

from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.checks import at_least, nearest_multiples
from minitron_megatron.config.common import DataConfig, DType, sequence_problems
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.config.plugins import PluginConfig


class Tracker(str, Enum):
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"


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
    overlap: bool = field(default=False, metadata=SAME_RESULT)

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
class DistillConfig(PluginConfig):
    """`minitron distill`: a student learns to predict what its teacher predicts.

    Attributes:
        teacher: checkpoint of the original model; null trains on the text alone.
        student: checkpoint to start from.
        output: folder of the trained checkpoint and its metrics.
        steps: optimiser steps.
        global_batch: sequences per step over all ranks.
        micro_batch: sequences per forward pass and rank.
        recompute: keep each layer's input alone and run the layer again in the backward pass, for less memory; of a
            teacher that is trained as well.
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
    seed: int = 1234
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=SAME_RESULT)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=SAME_RESULT)

    def problems(self, where: str = "") -> list[str]:
        found = []
        counts = ("steps", "global_batch", "micro_batch", "save_every", "validate_every", "validate_batches")
        for name in (*counts, "keep_checkpoints", "max_skipped_steps"):
            found += at_least(where, name, getattr(self, name), 1)
        for part in ("loss", "optimizer", "data", "parallel", "tracking"):
            found += getattr(self, part).problems(f"{where}{part}.")
        found += sequence_problems(where, self.data, self.parallel)
        weights = {"kd_logits_weight": self.loss.kd_logits_weight, "hidden.weight": self.loss.hidden.weight}
        for name, weight in weights.items() if self.teacher is None else ():
            if weight:
                found.append(
                    f"{where}teacher = null, but {where}loss.{name} = {weight}: "
                    f"name a teacher, or set the weight to 0 and {where}loss.lm_weight to 1"
                )
        if self.teacher is None and (self.teacher_fp8 or self.teacher_dtype):
            found.append(
                f"{where}teacher = null, and {where}{'teacher_fp8' if self.teacher_fp8 else 'teacher_dtype'} is of a "
                f"teacher: leave it out, or name one"
            )
        if self.teacher_lr is not None:
            if self.teacher_lr <= 0:
                found.append(f"{where}teacher_lr = {self.teacher_lr}: must be above 0, or null for a frozen teacher")
            if self.teacher is None:
                found.append(f"{where}teacher_lr = {self.teacher_lr}, but {where}teacher = null: set both or neither")
            elif not self.loss.needs_teacher:
                found.append(
                    f"{where}teacher_lr = {self.teacher_lr} trains a teacher that no loss looks at: set "
                    f"{where}loss.kd_logits_weight above 0, or {where}teacher_lr to null"
                )
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
