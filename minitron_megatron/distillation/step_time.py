"""Estimates the time and the cost of a distillation step. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.distillation.memory import num_micro_batches
from minitron_megatron.model.count import forward_flops_per_token
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.gpus import GPU


@dataclass(frozen=True)
class StepTime:
    """Time and cost.

    Attributes:
        seconds: of one step.
        tokens_per_s: over all GPUs.
        gpu_hours: of the whole run, without validation and checkpoints.
        cost: of the whole run, in the price's currency; None without a price.
    """

    seconds: float
    tokens_per_s: float
    gpu_hours: float
    cost: float | None


def estimate_step(
    student: Network,
    teachers: Sequence[Network],
    config: DistillConfig,
    layout: ParallelConfig,
    gpu: GPU,
    utilization: float = 0.4,
    price: float | None = None,
) -> StepTime:
    """Estimates the time of a step, and the cost of the run.

    A backward pass costs two forward passes, and a third one with `recompute`. The pipeline bubble is
    (p - 1) / (m * v) of the compute time (2104.04473, section 2.2).

    Args:
        student, teachers, config, layout: as of `estimate_memory`.
        gpu: one per rank.
        utilization: share of the peak that a GPU reaches outside of the bubble. Megatron-LM's README reports 41 % for
            its smallest model (2 billion parameters) on H100s, and 47 % for large ones. Narrow models and small
            micro-batches reach less.
        price: of one GPU per hour.
    """
    tokens = config.global_batch * config.data.sequence_length
    passes = 4 if config.recompute else 3
    flops_per_token = passes * forward_flops_per_token(student, config.data.sequence_length)
    for teacher in teachers if config.loss.needs_teacher else ():
        teacher_passes = passes if config.teacher_lr else 1
        flops_per_token += teacher_passes * forward_flops_per_token(teacher, config.data.sequence_length)
    bubble = (layout.pipeline - 1) / (num_micro_batches(config, layout) * layout.model_chunks)
    seconds = tokens * flops_per_token * (1 + bubble) / (layout.world_size * gpu.tflops * 1e12 * utilization)
    gpu_hours = seconds * config.steps * layout.world_size / 3600
    return StepTime(seconds, tokens / seconds, gpu_hours, None if price is None else price * gpu_hours)
