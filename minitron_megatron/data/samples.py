"""Token files become samples, and samples become each rank's micro-batches.

A sample is a dict of `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each
`[sequence]`; `labels[i]` is the token that follows `tokens[i]`. A micro-batch has the same keys, each
`[micro_batch, sequence]`.
"""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.tokens import Corpus, check_enough


class Samples(Protocol):
    """A sequence of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...


def training_samples(corpus: Corpus, config: DataConfig, num_samples: int) -> GPTDataset:
    """Megatron-Core's own shuffled samples of the training tokens, over as many epochs as it takes.

    Every rank of an initialised `torch.distributed` has to call it: the first one writes the order to
    `corpus.folder`, the others read it.

    Args:
        corpus: the tokens.
        config: its sequence length and seed.
        num_samples: of the whole run, however it is split over ranks and restarts: the order of the
            samples depends on it. The result may hold more.

    Raises:
        DataError: the corpus is too short.
    """
    check_enough(corpus, config.sequence_length)
    # The tokens are made already, so that of the tokenizer only its identity matters, to name the cache.
    tokenizer = SimpleNamespace(
        unique_identifiers={"fingerprint": corpus.tokenizer_fingerprint}, vocab_size=None, eod=None
    )
    settings = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.sequence_length,
        blend_per_split=[([corpus.train_prefix], None), None, None],
        path_to_cache=str(corpus.folder / "index"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, settings).build()
    return train


def heldout_samples(corpus: Corpus, sequence_length: int, num_samples: int | None = None) -> "HeldoutSamples":
    """The held-out tokens as windows in which every token but the first is predicted exactly once.

    Args:
        corpus: the tokens.
        sequence_length: tokens per window.
        num_samples: keep at most so many, from the beginning; null for all.

    Raises:
        DataError: the corpus is too short.
    """
    check_enough(corpus, sequence_length)
    return HeldoutSamples(corpus, sequence_length, num_samples)


class HeldoutSamples:
    """Windows of `sequence_length + 1` tokens at a stride of `sequence_length`; the last one is padded."""

    def __init__(self, corpus: Corpus, sequence_length: int, num_samples: int | None = None):
        self.sequence_length = sequence_length
        self.num_tokens = corpus.num_heldout_tokens
        num_windows = -(-(self.num_tokens - 1) // sequence_length)
        self.num_samples = num_windows if num_samples is None else min(num_samples, num_windows)
        self.indexed = IndexedDataset(corpus.heldout_prefix)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        first = index * self.sequence_length
        num_predicted = min(self.sequence_length, self.num_tokens - 1 - first)
        window = np.zeros(self.sequence_length + 1, dtype=np.int64)
        window[: num_predicted + 1] = self._tokens(first, num_predicted + 1)
        window = torch.from_numpy(window)
        positions = torch.arange(self.sequence_length)
        return {
            "tokens": window[:-1],
            "labels": window[1:],
            "loss_mask": (positions < num_predicted).float(),
            "position_ids": positions,
        }

    def _tokens(self, first: int, count: int) -> np.ndarray:
        # Documents lie one behind the other in the file, so that the stream needs no index. The caller copies:
        # the array reads a file map that Megatron-Core closes with the dataset, and would crash after that.
        dtype = self.indexed.index.dtype
        return self.indexed.bin_reader.read(dtype=dtype, count=count, offset=first * dtype().itemsize)


def rank_batches(
    dataset: Samples, first: int, count: int, micro_batch: int, data_rank: int, data_size: int
) -> Iterator[dict[str, Tensor]]:
    """One data-parallel rank's micro-batches of samples `first` to `first + count`.

    Row j of micro-batch m on rank d is sample `first + (m * data_size + d) * micro_batch + j`. Where the
    range or the dataset ends earlier the row repeats the last sample with a loss mask of zeros, so that
    every rank has the same number of micro-batches and no token counts twice.

    Args:
        dataset: the samples, the same on all ranks.
        first: the first sample.
        count: samples over all ranks.
        micro_batch: samples per micro-batch.
        data_rank: this rank's place among the replicas.
        data_size: number of replicas.

    Yields:
        dicts of `[micro_batch, sequence]`.
    """
    end = min(first + count, len(dataset))
    for start in range(first, end, micro_batch * data_size):
        own = start + data_rank * micro_batch
        rows = [_row(dataset, index, end) for index in range(own, own + micro_batch)]
        yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _row(dataset: Samples, index: int, end: int) -> Mapping[str, Tensor]:
    if index < end:
        return dataset[index]
    last = dataset[end - 1]
    return {**last, "loss_mask": torch.zeros_like(last["loss_mask"])}
