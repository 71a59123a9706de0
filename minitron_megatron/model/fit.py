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
from minitron_megatron.model.axes import Param
from minitron_megatron.model.count import forward_flops_per_token
from minitron_megatron.model.layers import Sublayer
from minitron_megatron.model.network import Network, layout_problems
from minitron_megatron.model.parameters import parameters
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


def estimate_memory(student: Network, teacher: Network | None, config: DistillConfig, layout: Layout) -> Memory:
    """Memory on a GPU of the pipeline stage that needs the most.

    Args:
        student, teacher: the whole networks; None for no teacher.
        config: settings of the run. A `teacher_dtype` of null counts as `dtype`. Of `parallel` nothing is read.
        layout: which can split both networks; see `layout_problems`.
    """
    stages = [_memory_of_stage(student, teacher, config, layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda memory: memory.total)


def estimate_step(
    student: Network,
    teacher: Network | None,
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
    student: Network,
    teacher: Network | None,
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
    for pipeline in _doublings(layout.pipeline, len(student.layers) // layout.virtual_pipeline):
        for tensor in _doublings(layout.tensor, gpus_per_node):
            candidate = _with_ranks(layout, tensor, pipeline, config.data.sequence_length)
            if any(layout_problems(network, candidate) for network in (student, teacher) if network):
                continue
            for changed in _cheaper(config, candidate):
                memory = estimate_memory(student, teacher, changed, candidate)
                if memory.fits(gpu):
                    return _changes(config, layout, changed, candidate), memory
    return None


def rank_parameters(network: Network, layout: Layout, stage: int) -> int:
    """Parameters on a rank of one pipeline stage, with the rows that pad the vocabulary."""
    return sum(_held(network, layout, stage))


def sublayer_activations(
    network: Network, sublayer: Sublayer, micro_batch: int, sequence_length: int, layout: Layout, dtype: DType
) -> int:
    """Bytes that a sublayer keeps of one micro-batch for its backward pass, on a rank.

    Per token in the number format: input and output of the norm, and what the kind of layer says. Beside it, in float32,
    the norm's statistics.

    Args:
        network: that it is part of.
        sublayer: one of the network's.
        micro_batch: sequences.
        sequence_length: tokens of each.
        layout: tensor parallelism splits all but norms and residual stream; with sequence parallelism these too.
        dtype: of computation.
    """
    tokens, size = micro_batch * sequence_length, _BYTES[dtype]
    statistics = _FLOAT32 * len(network.norm.tensors)
    norm = tokens * (2 * network.hidden_size * size + statistics) // _stream_ranks(layout)
    return norm + sublayer.activation_bytes(network, micro_batch, sequence_length, layout.tensor, size)


def _memory_of_stage(
    student: Network, teacher: Network | None, config: DistillConfig, layout: Layout, stage: int
) -> Memory:
    is_last = stage == layout.pipeline - 1
    size = _BYTES[config.dtype]
    found = dict(
        student_weights=rank_parameters(student, layout, stage) * size,
        gradients=rank_parameters(student, layout, stage) * _FLOAT32,
        optimizer=_optimizer(student, config.dtype, config, layout, stage),
        activations=_activations(student, config.dtype, config, layout, stage, config.recompute),
        # The loss adds the output weight's to the buffer by itself.
        weight_gradient=max(_held(student, layout, stage, outputs=False)) * size,
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


def _held(network: Network, layout: Layout, stage: int, outputs: bool = True) -> Iterator[int]:
    """Elements of each parameter that a rank of a stage holds."""
    layers = {number for chunk in _chunks(network, layout, stage) for number in chunk}
    for param in parameters(network):
        if param.layer not in layers if param.layer is not None else not _is_on(param, network, layout, stage):
            continue
        if outputs or param.layer is not None or not param.matmul:
            yield math.prod(param.shape) // (layout.tensor if param.split else 1)


def _is_on(param: Param, network: Network, layout: Layout, stage: int) -> bool:
    """Whether a stage has a parameter that is of no layer. A tied table is on both ends."""
    is_last = stage == layout.pipeline - 1
    return (stage == 0 or (is_last and network.tie_embeddings)) if param.is_embedding else is_last


def _chunks(network: Network, layout: Layout, stage: int) -> list[range]:
    """Numbers of the transformer layers on a pipeline rank, chunk by chunk."""
    ends = list(accumulate(layers_per_stage(len(network.layers), layout.stages), initial=0))
    return [range(ends[part], ends[part + 1]) for part in range(stage, layout.stages, layout.pipeline)]


def _optimizer(network: Network, dtype: DType, config: DistillConfig, layout: Layout, stage: int) -> int:
    """Two moments, and main weights beside weights that are not in float32."""
    per_parameter = (2 if dtype is DType.FP32 else 3) * _FLOAT32
    replicas = layout.data if config.optimizer.distributed else 1
    return -(-rank_parameters(network, layout, stage) * per_parameter // replicas)


def _stream_ranks(layout: Layout) -> int:
    """Ranks that share the residual stream."""
    return layout.tensor if layout.sequence else 1


def _stream(network: Network, dtype: DType, config: DistillConfig, layout: Layout) -> int:
    """Bytes of the residual stream of one micro-batch on a rank."""
    tokens = config.micro_batch * config.data.sequence_length
    return tokens * network.hidden_size * _BYTES[dtype] // _stream_ranks(layout)


def _layer(network: Network, number: int, dtype: DType, config: DistillConfig, layout: Layout) -> int:
    size = config.micro_batch, config.data.sequence_length
    own = [network.sublayers[position] for position in network.layers[number]]
    return sum(sublayer_activations(network, sublayer, *size, layout, dtype) for sublayer in own)


def _largest_layer(network: Network, dtype: DType, config: DistillConfig, layout: Layout) -> int:
    return max(_layer(network, number, dtype, config, layout) for number in range(len(network.layers)))


def _activations(
    network: Network, dtype: DType, config: DistillConfig, layout: Layout, stage: int, recompute: bool
) -> int:
    """What a stage keeps of all micro-batches whose backward pass is still to come, and one layer that is run again."""
    stream, chunks = _stream(network, dtype, config, layout), _chunks(network, layout, stage)
    layers = [number for chunk in chunks for number in chunk]
    if recompute:
        kept = len(layers) * stream
    else:
        kept = sum(_layer(network, number, dtype, config, layout) for number in layers)
    # What a chunk hands on, which on the last stage is the final norm's input.
    kept += len(chunks) * stream
    again = _largest_layer(network, dtype, config, layout) if recompute else 0
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


def _loss(student: Network, teacher: Network | None, config: DistillConfig, layout: Layout) -> int:
    """What `linear_distillation_loss` takes while it runs or while its backward pass does, whichever is more."""
    teacher = teacher if config.loss.kd_logits_weight else None
    tokens = config.micro_batch * config.data.sequence_length
    rows, size = student.padded_vocab_size // layout.tensor, _BYTES[config.dtype]
    logits = config.loss.logits
    copies = _KL_COPIES + (logits.temperature != 1) if logits.is_whole_forward_kl else _OTHER_COPIES
    per_logit = size + _FLOAT32 * (copies if teacher else _LM_COPIES)
    # The last hidden states and their gradient, of all tokens; under sequence parallelism they are gathered.
    states = (3 if layout.sequence else 2) * tokens * student.hidden_size * size
    if teacher:
        teacher_size = _BYTES[config.teacher_dtype or config.dtype]
        per_logit += teacher_size
        states += tokens * teacher.hidden_size * teacher_size if layout.sequence else 0
    chunk = min(config.loss.chunk_tokens, tokens) * rows * per_logit
    weight = rows * student.hidden_size
    return weight * _FLOAT32 + states + max(chunk, weight * size)


def _teacher_states(student: Network, teacher: Network, config: DistillConfig, layout: Layout, stage: int) -> int:
    """The teacher's last hidden states on the last stage, and those that hidden states are compared with on each."""
    count = int(stage == layout.pipeline - 1 and config.loss.kd_logits_weight > 0)
    hidden = config.loss.hidden
    if hidden.weight:
        of_layers = len(hidden.pairs) if hidden.pairs is not None else len(student.layers)
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
