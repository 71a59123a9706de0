"""Settings that several verbs have: text and number formats."""

import math
from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.checks import at_least
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.parallel import ParallelConfig


class DType(str, Enum):
    """Number format of weights and computation. Sums, softmaxes and optimiser state are float32 always."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


@dataclass
class DataConfig:
    """Where text comes from and how it becomes sequences.

    Attributes:
        text: text files (a document each), JSON-lines and Parquet files and saved Hugging Face datasets (a document a
            row: text, or `messages`), folders of these, corpora that are tokenised already (the prefix of Megatron's
            `.bin` and `.idx`), or `builtin` for the Python standard library's prose.
        cache_dir: tokenised corpora are kept here, one folder per content, tokenizer and split.
        sequence_length: tokens per sequence.
        heldout_pct: share of the documents that training and calibration never see, in percent.
        seed: decides the split and the order of the sequences.
        weights: how often training samples come from each of `text`, relative to each other; null: as often as its
            tokens make up all.
        text_field: what the text is called in a row.
        document_mask: where a sequence has several documents, tokens attend to their own alone, and positions begin
            anew with each.
        workers: processes that tokenise; null: as many as the cores and the text are worth.
    """

    text: list[str] = field(default_factory=lambda: ["builtin"])
    cache_dir: str = field(default="corpora", metadata=SAME_RESULT)
    sequence_length: int = 512
    heldout_pct: float = 5.0
    seed: int = 1234
    weights: list[float] | None = None
    text_field: str = "text"
    document_mask: bool = False
    workers: int | None = field(default=None, metadata=SAME_RESULT)

    def problems(self, where: str = "data.") -> list[str]:
        found = [*at_least(where, "sequence_length", self.sequence_length, 2), *at_least(where, "seed", self.seed, 0)]
        if not self.text:
            found.append(f"{where}text is empty: name files or folders, or `builtin`")
        if self.weights is not None:
            if len(self.weights) != len(self.text):
                found.append(
                    f"{where}weights has {len(self.weights)} numbers for the {len(self.text)} sources of {where}text: "
                    f"give one for each"
                )
            if not all(0 < weight < math.inf for weight in self.weights):
                found.append(f"{where}weights = {self.weights}: must be numbers above 0")
        if not self.text_field:
            found.append(f"{where}text_field is empty: name the field that holds the text")
        found += at_least(where, "workers", self.workers, 1)
        if not 0 < self.heldout_pct < 50:
            found.append(f"{where}heldout_pct = {self.heldout_pct}: must be above 0 and below 50")
        return found


def sequence_problems(where: str, data: DataConfig, parallel: ParallelConfig) -> list[str]:
    """The problem, if any, of sequences that cannot be split over the tensor ranks."""
    if not parallel.sequence or parallel.tensor < 1 or data.sequence_length % parallel.tensor == 0:
        return []
    return [
        f"{where}data.sequence_length = {data.sequence_length} is not a multiple of {where}parallel.tensor = "
        f"{parallel.tensor}, as {where}parallel.sequence = true needs: change one of the three"
    ]
