"""Small distillations: their settings, a run in a layout, and the weights that a run saved."""

from dataclasses import replace

from megatron.core.dist_checkpointing import load_plain_tensors

from minitron_megatron.checkpoint.dist_reader import iteration_folder
from minitron_megatron.config.schema import DataConfig, DistillConfig, DType, OptimizerConfig, ParallelConfig
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.training import distill


def settings(inputs, output, **changes):
    return DistillConfig(
        str(inputs / "checkpoint"),
        str(inputs / "checkpoint"),
        str(output),
        steps=1,
        dtype=DType.FP32,
        optimizer=OptimizerConfig(warmup_steps=0),
        data=DataConfig([str(inputs / f"{n}.txt") for n in range(20)], str(inputs / "corpora"), 16, seed=1),
        **changes,
    )


def weights_of(run, step, prefix=""):
    """All weights in a checkpoint of a run, by key, as Megatron's library reads them."""
    with parallel_context(ParallelConfig()):
        tensors = load_plain_tensors(str(run / "checkpoints" / iteration_folder(step)))
    parts = tuple(prefix + part for part in ("decoder.", "embedding.", "output_layer."))
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(parts)}


def run_in(config, parallel):
    distill.distill(replace(config, parallel=parallel))
