"""Finds the fewest changes of settings with which a distillation step fits a GPU. Needs no torch."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import product

from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.distillation.memory import Memory, estimate_memory
from minitron_megatron.model.network import Network, layout_problems
from minitron_megatron.parallel.gpus import GPU


def nearest_layout(
    student: Network,
    teachers: Sequence[Network],
    config: DistillConfig,
    layout: ParallelConfig,
    gpu: GPU,
    gpus_per_node: int,
) -> tuple[dict[str, int | bool], Memory] | None:
    """Finds the fewest changes of settings with which a step fits.

    Tries, in the given layout, recomputation, the distributed optimiser, smaller micro-batches, and combinations; then
    the same with twice as many tensor ranks, within a node; then with twice as many stages. Additional model-parallel
    ranks come from the replicas as far as they divide; otherwise GPUs are added.

    Returns:
        the changed settings by dotted name, empty if it fits already, and the memory with them; None if nothing helps.
    """
    for pipeline in _doublings(layout.pipeline, len(student.layers) // layout.model_chunks):
        for tensor in _doublings(layout.tensor, gpus_per_node):
            candidate = _with_ranks(layout, tensor, pipeline, config.data.sequence_length)
            if any(layout_problems(network, candidate) for network in (student, *teachers)):
                continue
            for changed in _cheaper_configs(config, candidate):
                memory = estimate_memory(student, teachers, changed, candidate)
                if memory.fits(gpu):
                    return _changes(config, layout, changed, candidate), memory
    return None


def _doublings(first: int, last: int) -> Iterator[int]:
    """Yields `first`, and doubles it up to `last`."""
    yield first
    while (first := 2 * first) <= last:
        yield first


def _with_ranks(layout: ParallelConfig, tensor: int, pipeline: int, sequence_length: int) -> ParallelConfig:
    # Without sequence parallelism each rank of a larger tensor group would keep all norms and residuals.
    sequence = layout.sequence or (tensor > layout.tensor and sequence_length % tensor == 0)
    more = tensor * pipeline // (layout.tensor * layout.pipeline)
    data = layout.replicas // math.gcd(layout.replicas, more)  # a divisor, so that the global batch still divides
    return dataclasses.replace(layout, tensor=tensor, pipeline=pipeline, data=data, sequence=sequence)


def _cheaper_configs(config: DistillConfig, layout: ParallelConfig) -> list[DistillConfig]:
    """Returns the settings, and every way to save memory in the same layout, fewest changes first."""
    halvings = [halving for halving in range(config.micro_batch.bit_length()) if config.micro_batch % 2**halving == 0]
    ways = product(
        [False] if config.recompute else [False, True],
        [False] if config.optimizer.distributed or layout.replicas == 1 else [False, True],
        halvings,
    )
    # With equally many changes, recomputation comes before the optimizer, and this before the micro-batch.
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


def _changes(
    old: DistillConfig, old_layout: ParallelConfig, new: DistillConfig, layout: ParallelConfig
) -> dict[str, int | bool]:
    values = {
        "recompute": (old.recompute, new.recompute),
        "optimizer.distributed": (old.optimizer.distributed, new.optimizer.distributed),
        "micro_batch": (old.micro_batch, new.micro_batch),
        **{
            f"parallel.{name}": (getattr(old_layout, name), getattr(layout, name))
            for name in ("tensor", "pipeline", "sequence")
        },
    }
    if old.parallel.data is not None:  # else the world's size gives it
        values["parallel.data"] = old.parallel.data, layout.replicas
    return {name: after for name, (before, after) in values.items() if after != before}
