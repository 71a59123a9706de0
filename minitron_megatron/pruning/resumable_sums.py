"""Sums over many samples that survive an interruption."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.data.samples import Samples, rank_batches
from minitron_megatron.errors import DataError
from minitron_megatron.files import replacing
from minitron_megatron.parallel.collectives import rank0_first, sum_over
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import Batch, to_device


class ResumableSums:
    """Sums over samples on all ranks, and saves the sums to a file at intervals.

    The file holds the sums of all ranks, so that an interrupted run can resume in another layout.

    Args:
        ctx: this rank's place.
        micro_batch: sequences per forward pass and rank.
        file: where sums are saved; None does not save them.
        content: identifies what is summed; a file with another content is ignored.
        save_every: micro-batches between two saves.
    """

    def __init__(
        self, ctx: ParallelContext, micro_batch: int, file: Path | None = None, content: str = "", save_every: int = 64
    ):
        self.ctx = ctx
        self.micro_batch = micro_batch
        self.file = file
        self.content = content
        self.save_every = save_every
        self._done: dict[str, int] = {}
        self._sums: dict[str, dict[str, Tensor]] = {}
        if file is not None:  # on rank 0, because a network file system may show others an older file
            self._done, self._sums = rank0_first(self._load)

    def over(
        self,
        name: str,
        samples: Samples,
        num_samples: int,
        sums: dict[str, Tensor],
        add: Callable[[Batch], Tensor],
        describe: Callable[[float], str],
        advance: Callable[[int], None],
    ) -> dict[str, Tensor]:
        """Returns the sums over all samples, on every rank. Collective.

        Args:
            name: of these sums, within the file.
            samples: each is read once over all data-parallel ranks.
            num_samples: number of samples.
            sums: this rank's own sums, zero at first.
            add: adds a micro-batch to `sums`, and returns the place of the first value that is not finite, inf if all
                are.
            describe: names such a place for messages.
            advance: called with the number of finished micro-batches.

        Returns:
            float64 tensors on the CPU, by the names in `sums`.

        Raises:
            DataError: a value is not finite. In any layout, every rank names the first place in the first such
                micro-batch, and no sums with it are saved.
        """
        layout, collection = self.ctx.layout, self.ctx.collection
        parallel = (collection.tp, collection.pp, collection.dp)
        per_step = self.micro_batch * layout.replicas
        first = self._done.get(name, 0)
        total = self._sums.get(name, {key: torch.zeros_like(value, device="cpu") for key, value in sums.items()})
        advance(first // per_step)
        batches = rank_batches(
            samples, first, num_samples - first, self.micro_batch, self.ctx.data_rank, layout.replicas
        )
        faults: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            last = min(first + per_step, num_samples)
            [batch] = to_device([batch], self.ctx.device)
            faults[f"samples {first} to {last - 1}"] = add(batch)
            advance(1)
            first = last
            if number % self.save_every == 0 or first == num_samples:
                _require_none(faults, parallel, describe)
                faults.clear()
                for key, value in sums.items():
                    for group in parallel:
                        sum_over(value, group)
                    total[key] = total[key] + value.cpu()
                    value.zero_()
                self._sums[name], self._done[name] = total, first
                self._save()
        return total

    def remove(self) -> None:
        """Removes the file once the work is done."""
        if self.file is not None and self.ctx.is_main:
            self.file.unlink(missing_ok=True)

    def _save(self) -> None:
        if self.file is None or not self.ctx.is_main:
            return
        tensors = {f"{name}.{key}": value for name, sums in self._sums.items() for key, value in sums.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as temporary:
            save_file(tensors, temporary, metadata={"content": self.content, "done": json.dumps(self._done)})

    def _load(self) -> tuple[dict[str, int], dict[str, dict[str, Tensor]]]:
        """Reads the number of samples done and their sums, by name; nothing if the file is of something else."""
        sums: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(self.file, framework="pt") as f:
                if f.metadata()["content"] != self.content:
                    return {}, {}
                for key in f.keys():  # noqa: SIM118, it is no dict
                    name, _, what = key.rpartition(".")
                    sums.setdefault(name, {})[what] = f.get_tensor(key)
                return json.loads(f.metadata()["done"]), sums
        except (OSError, SafetensorError, KeyError):
            return {}, {}


def _require_none(
    faults: dict[str, Tensor], parallel: Iterable[dist.ProcessGroup], describe: Callable[[float], str]
) -> None:
    """Raises for the first micro-batch in which any rank found a fault. Collective."""
    places = torch.stack(list(faults.values()))
    for group in parallel:
        if group.size() > 1:
            dist.all_reduce(places, dist.ReduceOp.MIN, group=group)
    for where, place in zip(faults, places.tolist(), strict=True):
        if math.isfinite(place):
            raise DataError(
                f"{describe(place)} are not finite in {where}: score in another dtype, or look at that text"
            )
