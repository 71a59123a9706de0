"""The settings of `minitron cache`."""

from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.checks import at_least
from minitron_megatron.config.common import DataConfig, DType
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.parallel import InferenceParallelConfig
from minitron_megatron.config.plugins import PluginConfig

MOST_DRAWS = 2**15 - 1
"""The largest number that is kept in two bytes."""


class CacheForm(str, Enum):
    """What is kept of a teacher's predictions."""

    SAMPLED = "sampled"  # tokens drawn by their probabilities; the expected gradient is that of the whole KL
    TOP_K = "top_k"  # the most likely tokens, and the probability of all others together; biased without it
    HIDDEN = "hidden"  # the last hidden states and the output weight; exact, for every divergence


@dataclass
class CacheConfig(PluginConfig):
    """`minitron cache`: run a teacher once over the samples of a run, and keep its predictions.

    `distill teacher=CACHE` then needs no teacher in memory. Its `data` and `seed` must be those of the cache, and its
    steps x global_batch the number of training samples.

    Attributes:
        teacher: checkpoint of the teacher.
        output: folder for the cache.
        num_samples: training samples: steps x global_batch of the run.
        heldout_samples: held-out samples: validate_batches x global_batch of the run; 0 for a run without validation.
        form: what is kept: drawn tokens, the most likely ones, or hidden states.
        draws: tokens drawn for every position, for sampled.
        top_k: tokens kept for every position, for top_k.
        temperature: softmax temperature, for sampled and top_k; the run's must be the same.
        seed: of the draws.
        shard_samples: samples of a file; an interrupted run goes on after the last whole one.
        micro_batch: sequences per forward pass and rank.
        chunk_tokens: tokens whose logits are computed at a time, which bounds memory.
        dtype: number format of weights and computation; null for the checkpoint's.
    """

    teacher: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    num_samples: int = 0
    heldout_samples: int = 0
    form: CacheForm = CacheForm.SAMPLED
    draws: int = 50
    top_k: int = 50
    temperature: float = 1.0
    seed: int = 1234
    shard_samples: int = 256
    micro_batch: int = field(default=4, metadata=SAME_RESULT)
    chunk_tokens: int = field(default=128, metadata=SAME_RESULT)
    dtype: DType | None = None
    data: DataConfig = field(default_factory=DataConfig)
    parallel: InferenceParallelConfig = field(default_factory=InferenceParallelConfig, metadata=SAME_RESULT)

    def problems(self, where: str = "") -> list[str]:
        problems = []
        for name in ("num_samples", "draws", "top_k", "shard_samples", "micro_batch", "chunk_tokens"):
            problems += at_least(where, name, getattr(self, name), 1)
        problems += at_least(where, "heldout_samples", self.heldout_samples, 0)
        if self.draws > MOST_DRAWS:
            problems.append(f"{where}draws = {self.draws}: must be at most {MOST_DRAWS}; form=hidden keeps everything")
        for name, form in {"draws": CacheForm.SAMPLED, "seed": CacheForm.SAMPLED, "top_k": CacheForm.TOP_K}.items():
            if getattr(self, name) != getattr(CacheConfig, name) and self.form is not form:
                problems.append(
                    f"{where}{name} = {getattr(self, name)} is for {where}form = {form.value}, and it is "
                    f"{self.form.value}: leave it out, or change the form"
                )
        if self.temperature <= 0:
            problems.append(f"{where}temperature = {self.temperature}: must be above 0; 1 changes nothing")
        if self.form is CacheForm.HIDDEN and self.temperature != 1:
            problems.append(
                f"{where}temperature = {self.temperature}, and {where}form = hidden keeps no probabilities: leave it "
                f"out, and set loss.logits.temperature of the run"
            )
        return [*problems, *self.data.problems(f"{where}data."), *self.parallel.problems(f"{where}parallel.")]
