"""Wraps a model in Megatron's DistributedDataParallel, with optimiser and learning-rate schedule."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_megatron.config.distill import Decay
from minitron_megatron.config.schema import DType, OptimizerConfig
from minitron_megatron.model.build import TORCH_DTYPES
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.training.fake_quant import FakeQuant
from minitron_megatron.training.masks import Masks


@dataclass
class TrainableModel:
    """A model with optimiser and schedule.

    Attributes:
        model_chunks: this rank's model in Megatron's DistributedDataParallel, which holds the gradients in float32.
        optimizer: AdamW with float32 main weights.
        schedule: of the learning rate, counted in steps.
        masks: of its sparse matrices; None if it is dense.
        fake_quant: rounds its weights after each step; None for no rounding.
    """

    model_chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    masks: Masks | None = None
    fake_quant: FakeQuant | None = None

    def zero_grad(self) -> None:
        """Sets all gradients to zero."""
        for chunk in self.model_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def grad_norm(self) -> float:
        """Returns the L2 norm of the whole gradient over all ranks, before clipping. Collective.

        Gradients of weights that stay zero do not count.
        """
        if self.masks:
            self.masks.mask_gradients()
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def zero_entries(self, parameter: torch.nn.Parameter, entries: torch.Tensor) -> None:
        """Zeroes entries of a weight, and what the optimiser keeps of them: main weights and moments.

        Args:
            parameter: of this rank's model.
            entries: bool, of its shape.
        """
        with torch.no_grad():
            parameter.masked_fill_(entries, 0)
            for own, held in _kept_of(self.optimizer, parameter, entries):
                own.masked_fill_(held, 0)

    def drop_smallest(self, sparsity: float) -> None:
        """Zeroes the smallest weights of every masked matrix, until this share of it is zero. Collective."""
        assert self.masks is not None
        for parameter, entries in self.masks.drop_smallest(sparsity):
            self.zero_entries(parameter, entries)

    def step(self) -> float:
        """Applies the gradients. Collective.

        Returns:
            the learning rate of this step.
        """
        # Megatron's schedule starts at 0: advancing it first gives the first step a rate above 0, and the last one
        # exactly the minimum.
        self.schedule.step(1)
        self.optimizer.step()
        return self.optimizer.param_groups[0]["lr"]


def setup_optimizer(
    model_chunks: list[GPTModel], config: OptimizerConfig, num_steps: int, dtype: DType, ctx: ParallelContext
) -> TrainableModel:
    """Makes a model trainable. Collective.

    Args:
        model_chunks: this rank's model, with its initial weights.
        config: settings of the optimiser.
        num_steps: steps of the whole run, over which the learning rate decays.
        dtype: of the weights.
        ctx: this rank's place.
    """
    wrapped = _wrap(model_chunks, config, ctx)
    optimizer = _make_optimizer(wrapped, config, dtype, ctx)
    for chunk in model_chunks:
        if config.overlap:  # reduce only after the last micro-batch
            no_sync = [own.no_sync for own in wrapped]
            chunk.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = optimizer.scale_loss
    return TrainableModel(wrapped, optimizer, _make_schedule(optimizer, config, num_steps))


def _wrap(model_chunks: list[GPTModel], config: OptimizerConfig, ctx: ParallelContext) -> list[DistributedDataParallel]:
    """Wraps a model in Megatron's DistributedDataParallel."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.distributed, overlap_grad_reduce=config.overlap
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config, ddp_config=ddp, module=chunk, disable_bucketing=i > 0, pg_collection=ctx.collection
        )
        for i, chunk in enumerate(model_chunks)
    ]
    if config.distributed:
        _count_padding(wrapped)
    return wrapped


def _make_optimizer(
    wrapped: list[DistributedDataParallel], config: OptimizerConfig, dtype: DType, ctx: ParallelContext
) -> MegatronOptimizer:
    """Makes Megatron's AdamW, with all of its state."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            use_distributed_optimizer=config.distributed,
            bf16=dtype is DType.BF16,
            fp16=dtype is DType.FP16,
            params_dtype=TORCH_DTYPES[dtype],
        ),
        wrapped,
        use_gloo_process_groups=not torch.cuda.is_available(),
    )
    for group in optimizer.param_groups:
        # Without Transformer Engine and Apex, Megatron-Core uses torch's AdamW, which is not fused on the CPU by
        # default. The others have no such option.
        if "fused" in group and ctx.device.type == "cpu":
            group["fused"] = True
    for part in optimizer.chained_optimizers:
        _make_state(part.optimizer)
    return optimizer


def _kept_of(
    optimizer: MegatronOptimizer, parameter: torch.nn.Parameter, entries: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the tensors that the optimiser keeps of a weight on this rank, each with its part of `entries`."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):  # it keeps a range of the flattened weight
            if parameter not in part.model_param_group_index_map:
                continue
            group, place = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][place]
            held = part._get_model_param_range_map(parameter)["param"]
            here = entries.flatten()[held.start : held.end].view_as(main)
        else:
            own = [other for group in part.param_groups for other in group["params"]]
            main, here = getattr(parameter, "main_param", parameter), entries
            if not any(other is main for other in own):
                continue
        yield main, here
        for tensor in part.optimizer.state[main].values():
            if torch.is_tensor(tensor) and tensor.shape == main.shape:
                yield tensor, here


def _make_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig, num_steps: int) -> OptimizerParamScheduler:
    """Makes the learning-rate schedule: linear warm-up, then the decay to the minimum."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style="WSD" if config.decay is Decay.WSD else config.decay.value,
        wsd_decay_steps=config.decay_steps,
        lr_wsd_decay_style="linear",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _count_padding(model_chunks: list[DistributedDataParallel]) -> None:
    """Makes checkpoints include the padding between buckets.

    Megatron-Core (0.16 and 0.19: DistributedOptimizer.get_parameter_state_dp_zero) concatenates the buckets' states
    without padding, but sharded_param_state_fully_reshardable indexes them with padding, so all states behind a padded
    bucket would be saved shifted. An embedding or projection on several stages has a bucket of its own.
    """
    for buffer in itertools.chain.from_iterable(chunk.buffers for chunk in model_chunks):
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the state that torch's AdamW would make in its first step.

    Megatron-Core's DistributedOptimizer.state_dict needs it before loading a checkpoint, and makes it itself only for
    the optimisers of Transformer Engine and Apex. Allocating it before the first activations also avoids fragmentation.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
