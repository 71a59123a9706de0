"""Settings that several verbs share: text and number formats."""

import math
from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.checks import at_least
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.parallel import ParallelConfig


class DType(str, Enum):
    """Number format of weights and computation. Sums, softmaxes and optimiser state are always float32."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def num_bytes(self) -> int:
        """Bytes of a number."""
        return 4 if self is DType.FP32 else 2


class OnBadRow(str, Enum):
    """What to do with a row of text that is broken, without text, or a conversation that cannot be taught."""

    ERROR = "error"
    SKIP = "skip"


@dataclass
class DataConfig:
    """Where text comes from and how it becomes sequences.

    Attributes:
        text: text files (one document each), files of JSON lines, JSON, CSV or Parquet and saved Hugging Face datasets
            (one document per row, with text or `messages`), folders of these, tokenised corpora (the prefix of
            Megatron's `.bin` and `.idx`), or `builtin` for the Python standard library's prose.
        cache_dir: folder for tokenised corpora, with a subfolder per content, tokenizer and split.
        sequence_length: tokens per sequence.
        heldout_pct: percentage of the documents that are held out from training and calibration.
        seed: seed of the held-out split and of the order of the sequences.
        weights: relative sampling weight of each source in `text`; null weights sources by their number of tokens.
        text_field: field of a row that holds the text.
        document_mask: mask attention between the documents of a sequence, and restart positions with each document.
        on_bad_row: `error` stops at a row that is broken, has no text, or whose conversation cannot be rendered; `skip`
            leaves it out, and the log says how many and why. Empty documents are left out in any case.
        workers: tokenizer processes; null chooses by cores and size of the text.
    """

    text: list[str] = field(default_factory=lambda: ["builtin"])
    cache_dir: str = field(default="corpora", metadata=SAME_RESULT)
    sequence_length: int = 512
    heldout_pct: float = 5.0
    seed: int = 1234
    weights: list[float] | None = None
    text_field: str = "text"
    document_mask: bool = False
    on_bad_row: OnBadRow = OnBadRow.ERROR
    workers: int | None = field(default=None, metadata=SAME_RESULT)

    def problems(self, where: str = "data.") -> list[str]:
        problems = [
            *at_least(where, "sequence_length", self.sequence_length, 2),
            *at_least(where, "seed", self.seed, 0),
        ]
        if not self.text:
            problems.append(f"{where}text is empty: name files or folders, or `builtin`")
        if self.weights is not None:
            if len(self.weights) != len(self.text):
                problems.append(
                    f"{where}weights has {len(self.weights)} numbers for the {len(self.text)} sources of {where}text: "
                    f"give one for each"
                )
            if not all(0 < weight < math.inf for weight in self.weights):
                problems.append(f"{where}weights = {self.weights}: must be numbers above 0")
        if not self.text_field:
            problems.append(f"{where}text_field is empty: name the field that holds the text")
        problems += at_least(where, "workers", self.workers, 1)
        if not 0 < self.heldout_pct < 50:
            problems.append(f"{where}heldout_pct = {self.heldout_pct}: must be above 0 and below 50")
        return problems


def sequence_problems(where: str, data: DataConfig, parallel: ParallelConfig) -> list[str]:
    """Returns a problem if sequence parallelism cannot split the sequences over the tensor ranks."""
    if not parallel.sequence or parallel.tensor < 1 or data.sequence_length % parallel.tensor == 0:
        return []
    return [
        f"{where}data.sequence_length = {data.sequence_length} is not a multiple of {where}parallel.tensor = "
        f"{parallel.tensor}, as {where}parallel.sequence = true needs: change one of the three"
    ]
