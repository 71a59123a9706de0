"""Metrics of a step, under the keys of `metrics.jsonl`."""

import time

import psutil
import torch
import torch.distributed as dist

from minitron_megatron.distillation.result import StepResult
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.gpus import peak_tflops


class Stopwatch:
    """Seconds of a step on this rank, part by part.

    Attributes:
        seconds: by name of a part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = self._last = time.perf_counter()

    def lap(self, name: str, less: tuple[str, float] | None = None) -> None:
        """Ends a part.

        Args:
            name: of the part.
            less: name and seconds of another part, that passed inside of this one.
        """
        now = time.perf_counter()
        other, seconds = less or ("", 0.0)
        if less:
            self.seconds[other] = seconds
        self.seconds[name] = now - self._last - seconds
        self._last = now

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return self._last - self._started


def largest_over_ranks(values: dict[str, float], ctx: ParallelContext) -> dict[str, float]:
    """Returns each value's largest over all ranks. Collective."""
    if ctx.layout.world_size == 1:
        return values
    largest = torch.tensor(list(values.values()), dtype=torch.float64, device=ctx.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return dict(zip(values, largest.tolist(), strict=True))


def loss_values(where: str, result: StepResult) -> dict[str, float]:
    """Returns the losses of a step, or of held-out text.

    Args:
        where: prefix of the keys, `loss` or `val`.
        result: what was measured.
    """
    values = {f"{where}/total": result.total}
    for name, entry in result.entries.items():
        values[f"{where}/{name}"] = entry.loss
        if list(entry.numerators) != [name]:  # one loss for each pair of hidden states
            values[f"{where}/alpha"] = result.alpha
            values |= {f"{where}/{name}/{pair}": loss for pair, loss in entry.pair_losses.items()}
    return values


def throughput_values(tokens_per_s: float, flops_per_s: float, ctx: ParallelContext) -> dict[str, float]:
    """Returns the throughput of a step.

    Args:
        tokens_per_s: valid tokens over all ranks.
        flops_per_s: floating-point operations of all models over all ranks, those for masked tokens included.
        ctx: this rank's place.
    """
    ranks = ctx.layout.world_size
    tflops = flops_per_s / ranks / 1e12
    values = {
        "throughput/tokens_per_s": tokens_per_s,
        "throughput/tokens_per_s_per_rank": tokens_per_s / ranks,
        "throughput/tflops_per_rank": tflops,
    }
    if ctx.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name())
        if peak:
            values["throughput/mfu_pct"] = 100 * tflops / peak
    return values


def memory_values(device: torch.device) -> dict[str, float]:
    """Returns the memory of this process now, in GiB; of a GPU, the peaks."""
    values = {"memory/rss_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        values["memory/allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        values["memory/reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return values
