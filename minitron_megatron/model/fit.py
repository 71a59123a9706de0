"""What a step of distillation takes of a GPU: memory, time and money, from shapes alone and without torch.

Counted is what Megatron-Core keeps on CUDA with Transformer Engine: flash attention, so that no score matrix is kept,
and of the matrices' inputs one copy each, as in Korthikanti et al. (2205.05198, section 4).
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product

from minitron_megatron.config.loss import Point
from minitron_megatron.config.schema import DistillConfig, DType
from minitron_megatron.model.axes import Param, axis_sizes, parameters
from minitron_megatron.model.count import forward_flops_per_token
from minitron_megatron.model.shape import ATTENTION, ModelShape, NormKind, layout_problems
from minitron_megatron.parallel.layout import Layout, layers_per_stage

GIB = 2**30
_BYTES = {DType.BF16: 2, DType.FP16: 2, DType.FP32: 4}
_FLOAT32 = 4


@dataclass(frozen=True)
class GPU:
    """A kind of GPU.

    Attributes:
        memory_gib: what a process can allocate, in GiB.
        tflops: peak of dense bf16 matrix products, in TFLOP/s.
    """

    memory_gib: float
    tflops: float


# Memory: "total capacity" as PyTorch reports it, a little below that of the data sheet. Peaks: NVIDIA's data sheets,
# whose figures with sparsity are twice these.
GPUS = {
    "h100": GPU(79.1, 989.4),  # H100 Tensor Core GPU data sheet: SXM, 80 GB
    "h200": GPU(139.8, 989.4),  # H200 Tensor Core GPU data sheet: SXM, 141 GB
    "a100-80gb": GPU(79.2, 312.0),  # A100 80GB data sheet: SXM
    "a100-40gb": GPU(39.4, 312.0),  # A100 Tensor Core GPU data sheet: SXM, 40 GB
}

# CUDA's context and kernels take 1.3 GB ("Model training anatomy" in the documentation of transformers). The rest is an
# assumption: NCCL's buffers, the workspaces of cuBLAS and Transformer Engine, and what the allocator cannot use.
_RESERVE = 3 * GIB

# Copies of a chunk's logits in float32, `work` of `linear_losses._kl_chunk`: the student's for cross-entropy, and for a
# forward KL the teacher's and their difference too. A temperature takes one more.
_LM_COPIES, _KL_COPIES = 1, 3
# In any other divergence, by autograd: as many as were alive at once on the CPU for the greediest, jensen_shannon.
_OTHER_COPIES = 12


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU of one pipeline stage.

    Attributes:
        stage: which pipeline stage, from 0.
        teacher_weights, student_weights: in their number formats.
        gradients: Megatron's buffers in float32.
        optimizer: main weights in float32, where the weights are not, and Adam's two moments.
        activations: what the student keeps for its backward pass, of all micro-batches on their way.
        weight_gradient: of the largest weight, before Megatron adds it to the buffer.
        loss: a chunk's logits and their copies, and the gradients of the output weight and the last hidden states.
        teacher_activations: while the teacher runs, which is over when the student begins.
        teacher_states: what it leaves behind for the losses, of all micro-batches of a step.
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
        """The peak: the teacher's activations are gone when the student's come."""
        lasting = self.teacher_weights + self.student_weights + self.gradients + self.optimizer + self.teacher_states
        passing = max(self.activations + self.weight_gradient + self.loss, self.teacher_activations)
        return lasting + passing + self.reserve

    def fits(self, gpu: GPU) -> bool:
        return self.total <= gpu.memory_gib * GIB


@dataclass(frozen=True)
class Step:
    """Time and cost.

    Attributes:
        seconds: of one step.
        tokens_per_s: over all GPUs.
        gpu_hours: of the whole run, without validation and checkpoints.
        cost: of the whole run, in the currency of the price; None without a price.
    """

    seconds: float
    tokens_per_s: float
    gpu_hours: float
    cost: float | None


def estimate_memory(student: ModelShape, teacher: ModelShape | None, config: DistillConfig, layout: Layout) -> Memory:
    """Memory on a GPU of the pipeline stage that needs the most.

    Args:
        student, teacher: shapes of the whole networks; None for no teacher.
        config: settings of the run. A `teacher_dtype` of null counts as `dtype`. Of `parallel` nothing is read.
        layout: which can split both networks; see `layout_problems`.
    """
    stages = [_memory_of_stage(student, teacher, config, layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda memory: memory.total)


def estimate_step(
    student: ModelShape,
    teacher: ModelShape | None,
    config: DistillConfig,
    layout: Layout,
    gpu: GPU,
    utilization: float = 0.4,
    price: float | None = None,
) -> Step:
    """Time of a step, and time and cost of the run.

    A backward pass costs two forward passes, and `recompute` a third one. A pipeline idles for (p - 1) / (m * v) of the
    time that it works (2104.04473, section 2.2).

    Args:
        student, teacher, config, layout: as of `estimate_memory`.
        gpu: of which there is one per rank.
        utilization: share of the peak that a GPU reaches while it works. Megatron-LM's README tells of 41 % for its
            smallest model, of two billion parameters, on H100s, and of 47 % for large ones. Narrow models and small
            micro-batches reach less.
        price: of one GPU for an hour.
    """
    tokens = config.global_batch * config.data.sequence_length
    passes = 4 if config.recompute else 3
    flops_per_token = passes * forward_flops_per_token(student, config.data.sequence_length)
    if teacher and config.loss.needs_teacher:
        teacher_passes = passes if config.teacher_lr else 1
        flops_per_token += teacher_passes * forward_flops_per_token(teacher, config.data.sequence_length)
    bubble = (layout.pipeline - 1) / (_num_micro_batches(config, layout) * layout.virtual_pipeline)
    seconds = tokens * flops_per_token * (1 + bubble) / (layout.world_size * gpu.tflops * 1e12 * utilization)
    gpu_hours = seconds * config.steps * layout.world_size / 3600
    return Step(seconds, tokens / seconds, gpu_hours, None if price is None else price * gpu_hours)


def nearest_layout(
    student: ModelShape,
    teacher: ModelShape | None,
    config: DistillConfig,
    layout: Layout,
    gpu: GPU,
    gpus_per_node: int,
) -> tuple[dict[str, int | bool], Memory] | None:
    """The fewest changes of settings with which a step fits.

    On the layout as it is come first recomputation, then the distributed optimiser, smaller micro-batches, and several
    of these; then the same with twice as many tensor ranks, within a node; then with twice as many stages. Replicas are
    given up for ranks as far as they divide, and where they do not, GPUs are added.

    Returns:
        settings by their dotted names, none where it fits already, and the memory with them; None if nothing helps.
    """
    for pipeline in _doublings(layout.pipeline, len(student.megatron_layers) // layout.virtual_pipeline):
        for tensor in _doublings(layout.tensor, gpus_per_node):
            candidate = _with_ranks(layout, tensor, pipeline, config.data.sequence_length)
            if any(layout_problems(shape, candidate) for shape in (student, teacher) if shape):
                continue
            for changed in _cheaper(config, candidate):
                memory = estimate_memory(student, teacher, changed, candidate)
                if memory.fits(gpu):
                    return _changes(config, layout, changed, candidate), memory
    return None


def rank_parameters(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Parameters on a rank of one pipeline stage, with the rows that pad the vocabulary."""
    return sum(numel for numel, _ in _held(shape, layout, stage))


def sublayer_activations(
    shape: ModelShape, symbol: str, micro_batch: int, sequence_length: int, layout: Layout, dtype: DType
) -> int:
    """Bytes that a sublayer keeps of one micro-batch for its backward pass, on a rank.

    Per token in the number format: input and output of the norm; queries, keys, values and the context, or the MLP's
    input of the activation and of the last matrix, and with a gate both factors. Beside it, in float32: the norms'
    statistics and the attention's log-sums. Norms of queries and keys keep the projection as well, and
    the queries by themselves. No dropout, so no masks.

    Args:
        shape: of the whole network.
        symbol: `*` for an attention sublayer, `-` for an MLP.
        micro_batch: sequences.
        sequence_length: tokens of each.
        layout: tensor parallelism splits all but norms and residual stream; with sequence parallelism these too.
        dtype: of computation.
    """
    tokens, size = micro_batch * sequence_length, _BYTES[dtype]
    statistics = _FLOAT32 * (2 if shape.norm is NormKind.LAYERNORM else 1)
    norm = tokens * (2 * shape.hidden * size + statistics) // _stream_ranks(layout)
    if symbol == ATTENTION:
        heads, groups = shape.num_heads // layout.tensor, max(1, shape.num_query_groups // layout.tensor)
        kept = tokens * ((2 * heads + 2 * groups) * shape.head_dim * size + heads * _FLOAT32)
        if layout.tensor > shape.num_query_groups:  # Megatron-Core gathers what all ranks project, and cuts views of it
            kept += tokens * (shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim * size
        if shape.qk_norm:  # of queries where Megatron-Core reshapes them, which copies what a group has several of
            copied = heads if shape.heads_per_group > 1 else 0
            kept += tokens * ((heads + 2 * groups + copied) * shape.head_dim * size + (heads + groups) * statistics)
        # Cosines and sines, which Megatron-Core makes anew for queries and for keys; all sequences share them.
        rotary = 4 * sequence_length * int(shape.rotary_fraction * shape.head_dim) * size
        return norm + kept + rotary
    # fc1's output, both halves; the activated gate; the product, which is fc2's input. Nothing here is fused.
    return norm + tokens * (4 if shape.gated else 2) * shape.ffn // layout.tensor * size


def _memory_of_stage(
    student: ModelShape, teacher: ModelShape | None, config: DistillConfig, layout: Layout, stage: int
) -> Memory:
    is_last = stage == layout.pipeline - 1
    size = _BYTES[config.dtype]
    found = dict(
        student_weights=rank_parameters(student, layout, stage) * size,
        gradients=rank_parameters(student, layout, stage) * _FLOAT32,
        optimizer=_optimizer(student, config.dtype, config, layout, stage),
        activations=_activations(student, config.dtype, config, layout, stage, config.recompute),
        # The loss adds the output weight's to the buffer by itself.
        weight_gradient=max(share for _, share in _held(student, layout, stage, outputs=False)) * size,
        loss=_loss(student, teacher, config, layout) if is_last else 0,
    )
    if teacher is None or not config.loss.needs_teacher:  # then it is not loaded
        return Memory(stage, **found)
    dtype = config.teacher_dtype or config.dtype
    numel = rank_parameters(teacher, layout, stage)
    found["teacher_weights"] = numel * _BYTES[dtype]
    found["teacher_states"] = _teacher_states(student, teacher, config, layout, stage)
    if config.teacher_lr is None:
        found["teacher_activations"] = _largest_layer(teacher, dtype, config, layout)
    else:
        found["gradients"] += numel * _FLOAT32
        found["optimizer"] += _optimizer(teacher, dtype, config, layout, stage)
        running = _activations(teacher, dtype, config, layout, stage, config.recompute)
        found["teacher_activations"] = running + (_loss(teacher, None, config, layout) if is_last else 0)
    return Memory(stage, **found)


def _held(shape: ModelShape, layout: Layout, stage: int, outputs: bool = True) -> Iterator[tuple[int, int]]:
    """Of each row of the axis table that a rank of a stage holds some of: its parameters there, and those of one
    layer."""
    sizes = axis_sizes(shape)
    pattern = "".join("".join(chunk) for chunk in _chunks(shape, layout, stage))
    for param in parameters(shape):
        count = pattern.count(param.sublayer) if param.sublayer else int(_is_on(param, shape, layout, stage))
        if not count or (not outputs and param.sublayer is None and param.matmul):
            continue
        numel = math.prod(param.size(sizes)) // (layout.tensor if param.split else 1)
        yield numel * count, numel


def _is_on(param: Param, shape: ModelShape, layout: Layout, stage: int) -> bool:
    """Whether a stage has a parameter that is of no layer. A tied table is on both ends."""
    is_last = stage == layout.pipeline - 1
    return (stage == 0 or (is_last and shape.tied)) if param.is_embedding else is_last


def _chunks(shape: ModelShape, layout: Layout, stage: int) -> list[list[str]]:
    """The layers on a pipeline rank, chunk by chunk, each by its sublayers."""
    layers = shape.megatron_layers
    ends = list(accumulate(layers_per_stage(len(layers), layout.stages), initial=0))
    return [layers[ends[part] : ends[part + 1]] for part in range(stage, layout.stages, layout.pipeline)]


def _optimizer(shape: ModelShape, dtype: DType, config: DistillConfig, layout: Layout, stage: int) -> int:
    """Two moments, and main weights beside weights that are not in float32."""
    per_parameter = (2 if dtype is DType.FP32 else 3) * _FLOAT32
    replicas = layout.data if config.optimizer.distributed else 1
    return -(-rank_parameters(shape, layout, stage) * per_parameter // replicas)


def _stream_ranks(layout: Layout) -> int:
    """Ranks that share the residual stream."""
    return layout.tensor if layout.sequence else 1


def _stream(shape: ModelShape, dtype: DType, config: DistillConfig, layout: Layout) -> int:
    """Bytes of the residual stream of one micro-batch on a rank."""
    tokens = config.micro_batch * config.data.sequence_length
    return tokens * shape.hidden * _BYTES[dtype] // _stream_ranks(layout)


def _layer(shape: ModelShape, layer: str, dtype: DType, config: DistillConfig, layout: Layout) -> int:
    size = config.micro_batch, config.data.sequence_length
    return sum(sublayer_activations(shape, symbol, *size, layout, dtype) for symbol in layer)


def _largest_layer(shape: ModelShape, dtype: DType, config: DistillConfig, layout: Layout) -> int:
    return max(_layer(shape, layer, dtype, config, layout) for layer in set(shape.megatron_layers))


def _activations(
    shape: ModelShape, dtype: DType, config: DistillConfig, layout: Layout, stage: int, recompute: bool
) -> int:
    """What a stage keeps of all micro-batches whose backward pass is still to come, and one layer that is run again."""
    stream, chunks = _stream(shape, dtype, config, layout), _chunks(shape, layout, stage)
    layers = [layer for chunk in chunks for layer in chunk]
    if recompute:
        kept = len(layers) * stream
    else:
        kept = sum(_layer(shape, layer, dtype, config, layout) for layer in layers)
    # What a chunk hands on, which on the last stage is the final norm's input.
    kept += len(chunks) * stream
    again = _largest_layer(shape, dtype, config, layout) if recompute else 0
    return _chunks_in_flight(config, layout, stage) * kept // len(chunks) + again


def _chunks_in_flight(config: DistillConfig, layout: Layout, stage: int) -> int:
    """Forward passes of a chunk of layers that a stage is ahead of its backward passes, at most.

    One forward, one backward (2104.04473, section 2.2), with Megatron-Core's warm-up where stages are interleaved.
    """
    ahead, chunks = layout.pipeline - stage, layout.virtual_pipeline
    if chunks > 1:
        ahead = 2 * (ahead - 1) + (chunks - 1) * layout.pipeline + 1
    return min(_num_micro_batches(config, layout) * chunks, ahead)


def _num_micro_batches(config: DistillConfig, layout: Layout) -> int:
    """Of one replica in one step."""
    return -(-config.global_batch // (config.micro_batch * layout.data))


def _loss(student: ModelShape, teacher: ModelShape | None, config: DistillConfig, layout: Layout) -> int:
    """What `linear_distillation_loss` takes while it runs or while its backward pass does, whichever is more."""
    teacher = teacher if config.loss.kd_logits_weight else None
    tokens = config.micro_batch * config.data.sequence_length
    rows, size = student.padded_vocab // layout.tensor, _BYTES[config.dtype]
    logits = config.loss.logits
    copies = _KL_COPIES + (logits.temperature != 1) if logits.is_whole_forward_kl else _OTHER_COPIES
    per_logit = size + _FLOAT32 * (copies if teacher else _LM_COPIES)
    # The last hidden states and their gradient, of all tokens; under sequence parallelism they are gathered.
    states = (3 if layout.sequence else 2) * tokens * student.hidden * size
    if teacher:
        teacher_size = _BYTES[config.teacher_dtype or config.dtype]
        per_logit += teacher_size
        states += tokens * teacher.hidden * teacher_size if layout.sequence else 0
    chunk = min(config.loss.chunk_tokens, tokens) * rows * per_logit
    weight = rows * student.hidden
    return weight * _FLOAT32 + states + max(chunk, weight * size)


def _teacher_states(student: ModelShape, teacher: ModelShape, config: DistillConfig, layout: Layout, stage: int) -> int:
    """The teacher's last hidden states on the last stage, and those that hidden states are compared with on each."""
    count = int(stage == layout.pipeline - 1 and config.loss.kd_logits_weight > 0)
    hidden = config.loss.hidden
    if hidden.weight:
        of_layers = len(hidden.pairs) if hidden.pairs is not None else len(student.megatron_layers)
        pairs = sum(1 if point is Point.EMBEDDING else of_layers for point in hidden.points)
        count += -(-pairs // layout.pipeline)
    dtype = config.teacher_dtype or config.dtype
    return count * _num_micro_batches(config, layout) * _stream(teacher, dtype, config, layout)


def _doublings(first: int, last: int) -> Iterator[int]:
    """`first`, and twice as many again and again, up to `last`."""
    yield first
    while (first := 2 * first) <= last:
        yield first


def _with_ranks(layout: Layout, tensor: int, pipeline: int, sequence_length: int) -> Layout:
    # A larger tensor group without sequence parallelism would keep all norms and residuals on each of its ranks.
    sequence = layout.sequence or (tensor > layout.tensor and sequence_length % tensor == 0)
    more = tensor * pipeline // (layout.tensor * layout.pipeline)
    data = layout.data // math.gcd(layout.data, more)  # a divisor, so that the global batch still divides
    return dataclasses.replace(layout, tensor=tensor, pipeline=pipeline, data=data, sequence=sequence)


def _cheaper(config: DistillConfig, layout: Layout) -> list[DistillConfig]:
    """The settings as they are, and every way to save memory in the same layout, fewest changes first."""
    halvings = [halving for halving in range(config.micro_batch.bit_length()) if config.micro_batch % 2**halving == 0]
    ways = product(
        [False] if config.recompute else [False, True],
        [False] if config.optimizer.distributed or layout.data == 1 else [False, True],
        halvings,
    )
    # Of as many changes, those to recomputation come before those to the optimizer and to the micro-batch.
    ordered = sorted(ways, key=lambda way: (sum(map(bool, way)), not way[0], not way[1], way[2]))
    return [
        dataclasses.replace(
            config,
            recompute=config.recompute or recompute,
            micro_batch=config.micro_batch // 2**halving,
            optimizer=dataclasses.replace(config.optimizer, distributed=config.optimizer.distributed or distributed),
        )
        for recompute, distributed, halving in ordered
    ]


def _changes(old: DistillConfig, old_layout: Layout, new: DistillConfig, layout: Layout) -> dict[str, int | bool]:
    values = {
        "recompute": (old.recompute, new.recompute),
        "optimizer.distributed": (old.optimizer.distributed, new.optimizer.distributed),
        "micro_batch": (old.micro_batch, new.micro_batch),
        **{
            f"parallel.{name}": (getattr(old_layout, name), getattr(layout, name))
            for name in ("tensor", "pipeline", "sequence")
        },
    }
    if old.parallel.data is not None:  # else it is what the world has
        values["parallel.data"] = old.parallel.data, layout.data
    return {name: after for name, (before, after) in values.items() if after != before}
