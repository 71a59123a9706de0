"""A teacher's predictions on a disk, by sample.

    CACHE/
        manifest.json                 teacher, corpus and settings; written last
        predictions.json              form, sizes, and the samples of each split
        train-00000.safetensors       predictions for samples 0 to `shard_samples` - 1 of the training samples
        heldout-00000.safetensors     the same of the held-out samples
        output.safetensors            `weight` [vocab, hidden] of the teacher's output layer, of the form `hidden`
        huggingface/                  the teacher's tokenizer

Tensors of a shard, `n` samples of `s` tokens each:

- `sampled`: `lengths` `[n, s]`, the number of distinct tokens drawn for each position; their ids, one after the other,
  as `ids` uint8 `[all, bytes of an id]`, the lowest byte first; `counts` `[all]`; `entropy` float32 `[n, s]`, of the
  teacher's whole prediction. Positions without a token that counts have no draws.
- `top_k`: `ids` uint8 `[n, s, k, bytes]`; `log_probs` float16 `[n, s, k]`; `log_rest` float32 `[n, s]`, the
  log-probability of all other tokens together.
- `hidden`: `hidden` `[n, s, hidden]`, the last hidden states, after the final norm.

`lengths` and `counts` are uint8, or int16 where there are more than 255 draws. What is predicted at a position is the
token after it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_megatron.artifacts.fingerprint import fingerprint
from minitron_megatron.artifacts.manifest import HUGGINGFACE, Manifest
from minitron_megatron.config.cache import CacheForm
from minitron_megatron.config.loss import LogitsConfig
from minitron_megatron.data.samples import FIRST_HELDOUT
from minitron_megatron.distillation.sparse_predictions import SampledPredictions, SparsePredictions, TopPredictions
from minitron_megatron.errors import CheckpointError
from minitron_megatron.files import read_json, replacing, write_json
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.schedule import PADDING

INDEX, OUTPUT = "predictions.json", "output.safetensors"
TRAIN, HELDOUT = "train", "heldout"
_TOP_K = ("ids", "log_probs", "log_rest")
_DTYPES = {"U8": torch.uint8, "I16": torch.int16}
_RAGGED = ("ids", "counts")
"""Tensors of drawn tokens that have no place for each position."""


@dataclass(frozen=True)
class Split:
    """The samples of a split.

    Attributes:
        fingerprint: see `data.samples`; with its index it identifies a sample.
        num_samples: that are cached, from the first one on.
    """

    fingerprint: str
    num_samples: int


@dataclass(frozen=True)
class CacheIndex:
    """What a cache holds.

    Attributes:
        form: of the predictions.
        vocab: tokens of the tokenizer.
        sequence_length: tokens of a sample.
        shard_samples: samples of every shard but the last of a split.
        temperature: softmax temperature of the predictions; 1 for hidden states.
        most: draws, or tokens kept, for a position; 0 for hidden states.
        splits: by name.
    """

    form: CacheForm
    vocab: int
    sequence_length: int
    shard_samples: int
    temperature: float
    most: int
    splits: Mapping[str, Split]

    @property
    def id_bytes(self) -> int:
        """Bytes of a token's id."""
        return max(1, math.ceil(math.log2(self.vocab) / 8))

    @property
    def count_dtype(self) -> torch.dtype:
        """Of numbers of draws."""
        return torch.uint8 if self.most < 2**8 else torch.int16

    def write(self, folder: Path) -> None:
        """Writes it into a cache's folder."""
        write_json(folder / INDEX, {**asdict(self), "form": self.form.value})

    @classmethod
    def read(cls, folder: Path) -> "CacheIndex":
        """Reads it from a cache's folder.

        Raises:
            CheckpointError: there is none, or it is none.
        """
        path = folder / INDEX
        values = read_json(path, "the index of a cache of predictions")
        try:
            splits = {name: Split(**split) for name, split in values.pop("splits").items()}
            return cls(**{**values, "form": CacheForm(values["form"])}, splits=splits)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CheckpointError(f"{path} is no index of a cache of predictions ({e}): make the cache again") from e

    def shards(self, split: str) -> list[range]:
        """Returns the samples of every shard of a split."""
        count = self.splits[split].num_samples
        return [range(first, min(first + self.shard_samples, count)) for first in range(0, count, self.shard_samples)]

    def files(self, folder: Path) -> list[Path]:
        """Returns the files in a folder that hold the tensors."""
        shards = [shard_path(folder, split, n) for split in self.splits for n in range(len(self.shards(split)))]
        return [*shards, *[folder / OUTPUT] * (self.form is CacheForm.HIDDEN)]

    def bytes_per_token(self, folder: Path) -> float:
        """Returns the bytes of the predictions in a folder for each token of their samples."""
        num_samples = sum(split.num_samples for split in self.splits.values())
        size = sum(path.stat().st_size for path in self.files(folder) if path.name != OUTPUT)
        return size / (num_samples * self.sequence_length)


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Returns the file of a shard."""
    return folder / f"{split}-{number:05d}.safetensors"


def pack_ids(ids: Tensor, num_bytes: int) -> Tensor:
    """Returns ids `[...]` as uint8 `[..., bytes]`, the lowest byte first."""
    shifts = 8 * torch.arange(num_bytes)
    return (ids[..., None] >> shifts & 255).to(torch.uint8)


def unpack_ids(packed: Tensor) -> Tensor:
    """Returns what `pack_ids` packed, int64."""
    shifts = 8 * torch.arange(packed.shape[-1])
    return (packed.long() << shifts).sum(-1)


def pack(sample: Mapping[str, Tensor], index: CacheIndex) -> dict[str, Tensor]:
    """Returns the tensors of a sample as they are kept.

    Args:
        sample: `hidden`; or `ids`, `log_probs` and `log_rest`; or `ids` and `counts` `[sequence, draws]`, distinct ids
            first and counts of 0 behind them, and `entropy`.
        index: of the cache.
    """
    packed = dict(sample)
    if "counts" in sample:
        is_drawn = sample["counts"] > 0
        packed["lengths"] = is_drawn.sum(1).to(index.count_dtype)
        packed["counts"] = sample["counts"][is_drawn].to(index.count_dtype)
        packed["ids"] = pack_ids(sample["ids"][is_drawn], index.id_bytes)
    elif "ids" in sample:
        packed["ids"] = pack_ids(sample["ids"], index.id_bytes)
        packed["log_probs"] = sample["log_probs"].half()
    return packed


def write_shard(path: Path, samples: Sequence[Mapping[str, Tensor]]) -> None:
    """Writes a shard of packed samples; it is there when it is whole."""
    is_ragged = "lengths" in samples[0]
    tensors = {
        key: (torch.cat if is_ragged and key in _RAGGED else torch.stack)([own[key] for own in samples])
        for key in samples[0]
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary)


class PredictionCache:
    """A finished cache, to be read.

    Args:
        folder: of the cache.

    Attributes:
        root: the folder.
        manifest: of the cache; its network is the teacher's.
        index: what it holds.

    Raises:
        CheckpointError: it is not whole, or a file is damaged.
    """

    def __init__(self, folder: Path):
        self.root = folder
        self.manifest = Manifest.read(folder)
        self.index = CacheIndex.read(folder)
        self._open: tuple[tuple[str, int], _Shard] | None = None
        digests = self.manifest.details.get("files", {})
        for path in self.index.files(folder):
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: make the cache again")
            if digests.get(path.name) != fingerprint(path):
                raise CheckpointError(f"{path} is damaged: remove {folder}, and make the cache again")

    @property
    def network(self) -> Network:
        """The teacher's."""
        return Network.from_dict(self.manifest.network or {})

    @property
    def huggingface_folder(self) -> Path:
        """With the teacher's tokenizer."""
        return self.root / HUGGINGFACE

    @property
    def has_states(self) -> bool:
        """Whether it holds hidden states."""
        return self.index.form is CacheForm.HIDDEN

    def output_weight(self) -> Tensor:
        """Returns the weight `[vocab, hidden]` of the teacher's output layer, of a cache of hidden states."""
        return load_file(self.root / OUTPUT)["weight"]

    def read(self, sample_ids: Sequence[int]) -> Tensor | SparsePredictions:
        """Reads the predictions for a micro-batch.

        Args:
            sample_ids: as in the batch, see `data.samples`; rows of `PADDING` get some that no loss counts.

        Returns:
            sparse predictions `[sequence x batch, ...]`, or hidden states `[sequence x batch, hidden]`, in the order of
            `step.predictions_of`.

        Raises:
            CheckpointError: a sample is not in the cache, or a shard cannot be read.
        """
        known = next((own for own in sample_ids if own != PADDING), 0)
        rows = [self._sample(known if own == PADDING else own) for own in sample_ids]
        if self.has_states:
            return _by_position([row["hidden"] for row in rows])
        if self.index.form is CacheForm.TOP_K:
            ids, log_probs, log_rest = (_by_position([row[key] for row in rows]) for key in _TOP_K)
            return TopPredictions(unpack_ids(ids), log_probs.float(), log_rest)
        lengths = torch.stack([row["lengths"] for row in rows]).long()
        is_drawn = torch.arange(max(1, int(lengths.max()))) < lengths[..., None]
        ids = torch.zeros(is_drawn.shape, dtype=torch.int64)
        ids[is_drawn] = unpack_ids(torch.cat([row["ids"] for row in rows]))
        shares = torch.zeros(is_drawn.shape)
        shares[is_drawn] = torch.cat([row["counts"] for row in rows]).float() / self.index.most
        entropy = _by_position([row["entropy"] for row in rows])
        return SampledPredictions(_by_position(ids), _by_position(shares), entropy)

    def _sample(self, sample_id: int) -> dict[str, Tensor]:
        """Reads the tensors of a sample."""
        split, number = (HELDOUT, sample_id - FIRST_HELDOUT) if sample_id >= FIRST_HELDOUT else (TRAIN, sample_id)
        if not 0 <= number < self.index.splits[split].num_samples:
            raise CheckpointError(f"{self.root} has no predictions for {split} sample {number}")
        place, row = divmod(number, self.index.shard_samples)
        return self._shard(split, place).sample(row)

    def _shard(self, split: str, number: int) -> "_Shard":
        """Returns a shard, which stays open for the samples that follow."""
        if self._open is None or self._open[0] != (split, number):
            self._open = (split, number), _Shard(shard_path(self.root, split, number))
        return self._open[1]

    def problems(self, config: LogitsConfig, where: str = "loss.logits.") -> list[str]:
        """Returns why a divergence cannot be computed from these predictions, one sentence each."""
        form, index = self.index.form, self.index
        if self.has_states:
            return []
        problems = []
        if config.temperature != index.temperature:
            problems.append(
                f"{where}temperature = {config.temperature}, and {self.root} has predictions at {index.temperature}: "
                f"set it to that, or make a cache of hidden states, which has all temperatures"
            )
        if form is CacheForm.SAMPLED and not config.is_whole_forward_kl:
            problems.append(
                f"{where}divergence = {config.divergence.value}{f', top_k = {config.top_k}' * bool(config.top_k)}: the "
                f"drawn tokens in {self.root} give forward_kl over the whole vocabulary alone: set that, or make a "
                f"cache with form=top_k or form=hidden"
            )
        if form is CacheForm.TOP_K and config.top_k != index.most:
            problems.append(
                f"{where}top_k = {config.top_k}, and {self.root} has the {index.most} most likely tokens: set it to "
                f"that, with {where}tail=true for all others together, or make another cache"
            )
        return problems

    def sample_problems(self, split: str, fingerprint: str, num_samples: int, setting: str) -> list[str]:
        """Returns why it has no predictions for the samples of a run, in one sentence.

        Args:
            split: of the samples.
            fingerprint: of the samples.
            num_samples: that the run needs, from the first one on.
            setting: words for the settings that decide their number.
        """
        own = self.index.splits.get(split, Split("", 0))
        name, count = {TRAIN: "num_samples", HELDOUT: "heldout_samples"}[split], own.num_samples
        if split == TRAIN and count != num_samples:
            return [
                f"{self.root} has predictions for {count} training samples, up to sample {count - 1}, and {setting} = "
                f"{num_samples}, whose order is another: make them equal, or a cache with {name}={num_samples}"
            ]
        if count < num_samples:
            return [
                f"{self.root} has predictions for {count} held-out samples, and ends before sample {count} of "
                f"{setting} = {num_samples}: make a cache with {name}={num_samples}, or validate on fewer"
            ]
        if num_samples and own.fingerprint != fingerprint:
            text = self.manifest.config.get("data", {}).get("text")
            return [
                f"{self.root} has predictions for other {split} samples ({own.fingerprint[:12]}, of data.text = "
                f"{text}) than this run's ({fingerprint[:12]}): give the run the cache's data.*, or make another cache"
            ]
        return []


class _Shard:
    """An open shard."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{path} cannot be read ({e}): make the cache again") from e
        self._ends: Tensor | None = None
        if "lengths" in self._file.keys():  # noqa: SIM118, it is no dict
            self._ends = self._file.get_tensor("lengths").long().sum(1).cumsum(0)

    def sample(self, row: int) -> dict[str, Tensor]:
        """Returns the tensors of a sample."""
        tensors = {}
        for key in self._file.keys():  # noqa: SIM118, it is no dict
            values = self._file.get_slice(key)
            if self._ends is not None and key in _RAGGED:
                begin, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
                # A slice of nothing cannot be read at the end of a tensor.
                nothing = torch.empty((0, *values.get_shape()[1:]), dtype=_DTYPES[values.get_dtype()])
                tensors[key] = values[begin:end] if begin < end else nothing
            else:
                tensors[key] = values[row]
        return tensors


def _by_position(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """Turns `[batch][sequence, ...]` into `[sequence x batch, ...]`."""
    return torch.stack(list(rows), dim=1).flatten(0, 1)
