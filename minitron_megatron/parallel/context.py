"""Process groups: the one file that reads Megatron-Core's `parallel_state`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_megatron.config.parallel import InferenceParallelConfig, ParallelConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.parallel.cpu import install_cpu_backend
from minitron_megatron.parallel.watchdog import watchdog

logger = logging.getLogger(__name__)

# Ranks wait in the world's group while the first one tokenises a corpus, which can take longer than NCCL's 10 minutes.
# The groups in which models run have the setting's, and a little more, so that the stacks are told before.
_WORLD_TIMEOUT = timedelta(days=1)
_AFTER_WATCHDOG_MIN = 1


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the layout.

    Attributes:
        layout: sizes of every axis, for the world that there is.
        collection: Megatron-Core's process groups (`tp`, `pp`, `dp`, `embd`, ...).
        timeout_min: ranks that wait for each other for so many minutes are ended; None where nobody waits, or
            somebody's own job sees to it.
    """

    layout: ParallelConfig
    collection: ProcessGroupCollection
    timeout_min: float | None = None

    @property
    def tensor_rank(self) -> int:
        return self.collection.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.collection.pp.rank()

    @property
    def data_rank(self) -> int:
        return self.collection.dp.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline - 1

    @property
    def device(self) -> torch.device:
        return torch.device(torch.cuda.current_device())

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks for the run and writes its small files."""
        return dist.get_rank() == 0


def current_context(sequence: bool = False) -> ParallelContext:
    """The layout of a job that has initialised Megatron-Core's `parallel_state` by itself.

    Args:
        sequence: whether its models use sequence parallelism.
    """
    layout = ParallelConfig(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        data=parallel_state.get_data_parallel_world_size(),
        virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        sequence=sequence,
    )
    return ParallelContext(layout, ProcessGroupCollection.use_mpu_process_groups())


@contextmanager
def parallel_context(config: InferenceParallelConfig) -> Iterator[ParallelContext]:
    """Join the world that the launcher made (or a world of one), lay it out, and leave it at the end.

    The backend is NCCL where CUDA exists, else gloo. Ranks that wait for each other for `timeout_min` are ended by a
    `watchdog`, here as well: joining, or loading a model, may hang. What takes longer has a block of its own.

    Raises:
        ConfigError: the world's size does not fit the layout, or the port to meet at is taken.
    """
    install_cpu_backend()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    layout = config.in_world(world_size)
    timeout_min = config.timeout_min if world_size > 1 else None
    with watchdog(timeout_min), _joined(layout) as collection:
        yield ParallelContext(layout, collection, timeout_min)


@contextmanager
def _joined(layout: ParallelConfig) -> Iterator[ProcessGroupCollection]:
    owns_world, world_size = not dist.is_initialized(), layout.world_size
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_device())
    if owns_world:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            _meet(backend)
    replicas = torch.cuda.device_count() // (layout.tensor * layout.pipeline)
    if replicas > layout.replicas:
        logger.info("parallel.data=%d would use all GPUs of this machine; %d of them are used", replicas, world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            distributed_timeout_minutes=layout.timeout_min + _AFTER_WATCHDOG_MIN,
        )
        # Nothing here draws from it: there is no dropout, and weights are loaded. Megatron-Core wants it all the same.
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        if owns_world:
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Join the other ranks.

    Raises:
        ConfigError: the port that they are to meet at is taken.
    """
    try:
        dist.init_process_group(backend, timeout=_WORLD_TIMEOUT)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        problem = f"MASTER_PORT: something else listens at {where}: set another, or cluster.port of a launch"
        raise ConfigError([problem]) from None


def _local_device() -> int:
    """This rank's GPU: by its number on the machine, or the only one where the launcher shows each rank one."""
    return int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
