"""Estimates the GPU memory of a distillation step from networks and settings alone, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minitron_megatron.config.loss import EMBEDDING
from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.config.schema import DistillConfig, DType
from minitron_megatron.distillation.pairs import Tap, resolve_pairs
from minitron_megatron.model.memory_estimate import (
    DTYPE_BYTES,
    FLOAT32_BYTES,
    largest_layer_activations,
    largest_weight,
    layer_activations,
    rank_parameters,
    residual_stream_bytes,
    stage_layers,
)
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.gpus import GPU

GIB = 2**30

# CUDA's context and kernels take 1.3 GB ("Model training anatomy" in the documentation of transformers). The rest is an
# assumption: NCCL's buffers, the workspaces of cuBLAS and Transformer Engine, and fragmentation.
_RESERVE = 3 * GIB

# Copies of a block of logits in float32 (`work` in `linear_losses._kl_chunk`): the student's for cross-entropy; for a
# forward KL also the teacher's and their difference. A temperature takes one more.
_LM_COPIES, _KL_COPIES = 1, 3
# Copies for any other divergence, by autograd: the peak measured on the CPU for jensen_shannon, which needs the most.
_OTHER_COPIES = 12


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU of one pipeline stage.

    Attributes:
        stage: which pipeline stage, from 0.
        teacher_weights, student_weights: in their dtypes.
        gradients: Megatron's buffers in float32.
        optimizer: main weights in float32, if the weights are not, and Adam's two moments.
        activations: kept by the student for its backward pass, of all micro-batches in flight.
        weight_gradient: of the largest weight, before Megatron adds it to the buffer.
        loss: a block of logits and its copies, and the gradients of the output weight and the last hidden states.
        teacher_activations: while the teacher runs; freed before the student runs.
        teacher_states: the teacher's hidden states for the losses, of all micro-batches of a step.
        reserve: CUDA, NCCL and fragmentation; an assumption.
    """

    stage: int
    teacher_weights: int = 0
    student_weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    weight_gradient: int = 0
    loss: int = 0
    teacher_activations: int = 0
    teacher_states: int = 0
    reserve: int = _RESERVE

    @property
    def total(self) -> int:
        """The peak: the larger of the teacher's and the student's activations, which are not there together."""
        lasting = self.teacher_weights + self.student_weights + self.gradients + self.optimizer + self.teacher_states
        passing = max(self.activations + self.weight_gradient + self.loss, self.teacher_activations)
        return lasting + passing + self.reserve

    def fits(self, gpu: GPU) -> bool:
        """Returns whether it fits into a GPU's memory."""
        return self.total <= gpu.memory_gib * GIB


def estimate_memory(
    student: Network, teachers: Sequence[Network], config: DistillConfig, layout: ParallelConfig
) -> Memory:
    """Estimates the memory on a GPU of the pipeline stage that needs the most.

    Args:
        student, teachers: the whole networks; the teachers that teach at the same time.
        config: settings of the run. A `teacher_dtype` of null means `dtype`. `parallel` is not used.
        layout: can split all networks; see `layout_problems`.
    """
    config = replace(config, loss=config.loss.largest)
    stages = [_stage_memory(student, teachers, config, layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda memory: memory.total)


def num_micro_batches(config: DistillConfig, layout: ParallelConfig) -> int:
    """Returns the micro-batches of one replica in one step."""
    return -(-config.global_batch // (config.micro_batch * layout.replicas))


def _stage_memory(
    student: Network, teachers: Sequence[Network], config: DistillConfig, layout: ParallelConfig, stage: int
) -> Memory:
    teachers = teachers if config.loss.needs_teacher else ()  # else they are not loaded
    is_last = stage == layout.pipeline - 1
    size = DTYPE_BYTES[config.dtype]
    terms = dict(
        student_weights=rank_parameters(student, layout, stage) * size,
        gradients=rank_parameters(student, layout, stage) * FLOAT32_BYTES,
        optimizer=_optimizer(student, config.dtype, config, layout, stage),
        activations=_activations(student, config.dtype, config, layout, stage),
        # Without the output weight's, which the loss adds to the buffer.
        weight_gradient=largest_weight(student, layout, stage) * size,
        loss=_loss(student, teachers, config, layout) if is_last else 0,
        teacher_weights=0,
        teacher_states=0,
        teacher_activations=0,
    )
    dtype = config.teacher_dtype or config.dtype
    for teacher in teachers:
        numel = rank_parameters(teacher, layout, stage)
        terms["teacher_weights"] += numel * DTYPE_BYTES[dtype]
        terms["teacher_states"] += _teacher_states(student, teacher, config, layout, stage)
        if config.teacher_lr is None:
            activations = largest_layer_activations(teacher, *_batch_size(config), layout, dtype)
        else:
            terms["gradients"] += numel * FLOAT32_BYTES
            terms["optimizer"] += _optimizer(teacher, dtype, config, layout, stage)
            activations = _activations(teacher, dtype, config, layout, stage)
            activations += _loss(teacher, (), config, layout) if is_last else 0
        terms["teacher_activations"] = max(terms["teacher_activations"], activations)  # they run in turn
    return Memory(stage, **terms)


def _batch_size(config: DistillConfig) -> tuple[int, int]:
    """Returns the sequences of a micro-batch, and the tokens of each."""
    return config.micro_batch, config.data.sequence_length


def _optimizer(network: Network, dtype: DType, config: DistillConfig, layout: ParallelConfig, stage: int) -> int:
    """Returns the bytes of two moments, and of main weights if the weights are not in float32."""
    per_parameter = (2 if dtype is DType.FP32 else 3) * FLOAT32_BYTES
    replicas = layout.replicas if config.optimizer.distributed else 1
    return -(-rank_parameters(network, layout, stage) * per_parameter // replicas)


def _activations(network: Network, dtype: DType, config: DistillConfig, layout: ParallelConfig, stage: int) -> int:
    """Returns the activation bytes of all micro-batches in flight on a stage, and of one recomputed layer."""
    size = _batch_size(config)
    stream, model_chunks = residual_stream_bytes(network, *size, layout, dtype), stage_layers(network, layout, stage)
    layers = [number for chunk in model_chunks for number in chunk]
    if config.recompute:
        kept = len(layers) * stream
    else:
        kept = sum(layer_activations(network, number, *size, layout, dtype) for number in layers)
    # A model chunk's output, on the last stage the final norm's input.
    kept += len(model_chunks) * stream
    again = largest_layer_activations(network, *size, layout, dtype) if config.recompute else 0
    return _chunks_in_flight(config, layout, stage) * kept // len(model_chunks) + again


def _chunks_in_flight(config: DistillConfig, layout: ParallelConfig, stage: int) -> int:
    """Returns how many forward passes of model chunks a stage is ahead of its backward passes, at most.

    1F1B (2104.04473, section 2.2), with Megatron-Core's warm-up if stages are interleaved.
    """
    ahead, model_chunks = layout.pipeline - stage, layout.model_chunks
    if model_chunks > 1:
        ahead = 2 * (ahead - 1) + (model_chunks - 1) * layout.pipeline + 1
    return min(num_micro_batches(config, layout) * model_chunks, ahead)


def _loss(student: Network, teachers: Sequence[Network], config: DistillConfig, layout: ParallelConfig) -> int:
    """Returns the peak bytes of `linear_distillation_loss`, in its forward or its backward pass."""
    # Divergences from several teachers are computed one after the other.
    widest = max((own.hidden_size for own in teachers), default=0) if config.loss.kd_logits_weight else 0
    tokens = config.micro_batch * config.data.sequence_length
    rows, size = student.padded_vocab_size // layout.tensor, DTYPE_BYTES[config.dtype]
    logits = config.loss.logits
    copies = _KL_COPIES + (logits.temperature != 1) if logits.is_whole_forward_kl else _OTHER_COPIES
    per_logit = size + FLOAT32_BYTES * (copies if widest else _LM_COPIES)
    # The last hidden states and their gradient, of all tokens; sequence parallelism gathers them.
    states = (3 if layout.sequence else 2) * tokens * student.hidden_size * size
    if widest:
        teacher_size = DTYPE_BYTES[config.teacher_dtype or config.dtype]
        per_logit += teacher_size
        states += tokens * widest * teacher_size if layout.sequence else 0
    block = min(config.loss.chunk_tokens, tokens) * rows * per_logit
    weight = rows * student.hidden_size
    # Each divergence keeps its gradients until the backward pass.
    passes = max(1, len(teachers))
    return passes * (weight * FLOAT32_BYTES + states) + max(block, weight * size)


def _teacher_states(
    student: Network, teacher: Network, config: DistillConfig, layout: ParallelConfig, stage: int
) -> int:
    """Returns the bytes of the teacher's last hidden states, on the last stage, and of its states for hidden losses."""
    count = int(stage == layout.pipeline - 1 and config.loss.kd_logits_weight > 0)
    hidden = config.loss.hidden
    if hidden.weight:

        def is_here(network: Network, tap: Tap) -> bool:
            point, layer = tap
            return (
                stage == 0 if point == EMBEDDING else any(layer in own for own in stage_layers(network, layout, stage))
            )

        # Those that the student is compared with here, and those that are sent to other stages.
        pairs = resolve_pairs(hidden, student, teacher)
        taps = {p.teacher_tap for p in pairs if is_here(student, p.student_tap) or is_here(teacher, p.teacher_tap)}
        count += len(taps)
    size = residual_stream_bytes(teacher, *_batch_size(config), layout, config.teacher_dtype or config.dtype)
    return count * num_micro_batches(config, layout) * size
