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

from minitron_megatron.config.parallel import DataParallelConfig, ParallelConfig
from minitron_megatron.errors import ConfigError, raise_if_any
from minitron_megatron.parallel.cpu import install_cpu_backend
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.process import meeting_problems

logger = logging.getLogger(__name__)

# Ranks wait in the world's group while rank 0 tokenises a corpus, which can take longer than NCCL's default of 10
# minutes. The model-parallel groups time out a little after the watchdog, which logs the stacks first.
_WORLD_TIMEOUT = timedelta(days=1)
_AFTER_WATCHDOG_MIN = 1


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the layout, and its process groups.

    Attributes:
        layout: sizes of every axis, for the world that there is.
        collection: Megatron-Core's process groups (`tp`, `pp`, `dp`, `embd`, ...).
        timeout_min: abort after this many minutes without progress; None with one rank, or where the caller's own job
            has a watchdog.
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
        """Whether this is rank 0, which logs for the run and writes its small files."""
        return dist.get_rank() == 0


def current_context(sequence: bool = False) -> ParallelContext:
    """Returns the context of a job that has initialised Megatron-Core's `parallel_state` by itself.

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
def parallel_context(config: DataParallelConfig) -> Iterator[ParallelContext]:
    """Initialises torch.distributed and `parallel_state` for the block, in the launcher's world or a world of one.

    The backend is NCCL where CUDA exists, else gloo. A `watchdog` kills ranks that make no progress for `timeout_min`,
    also while they join or load a model. Work that takes longer enters a watchdog of its own.

    Raises:
        ConfigError: the world's size does not fit the layout, or MASTER_PORT is taken.
    """
    install_cpu_backend()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    layout = config.in_world(world_size)
    timeout_min = config.timeout_min if world_size > 1 else None
    with watchdog(timeout_min), _process_groups(layout) as collection:
        yield ParallelContext(layout, collection, timeout_min)


@contextmanager
def float32_matmuls() -> Iterator[None]:
    """Has float32 products of matrices computed in float32 while the block runs; some containers default to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _process_groups(layout: ParallelConfig) -> Iterator[ProcessGroupCollection]:
    owns_world, world_size = not dist.is_initialized(), layout.world_size
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_device())
    if owns_world:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            _init_process_group(backend)
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
        # Megatron-Core requires a seed. Nothing draws from it: there is no dropout, and weights are loaded.
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        if owns_world:
            dist.destroy_process_group()


def _init_process_group(backend: str) -> None:
    """Initialises the process group with the other ranks.

    Raises:
        ConfigError: MASTER_PORT is taken.
    """
    raise_if_any(meeting_problems(os.environ))
    try:
        dist.init_process_group(backend, timeout=_WORLD_TIMEOUT)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        problem = f"MASTER_PORT: something else listens at {where}: set another, or cluster.port of a launch"
        raise ConfigError([problem]) from None


def _local_device() -> int:
    """Returns this rank's GPU: LOCAL_RANK, or 0 where the launcher makes one GPU visible to each rank."""
    return int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
