"""Makes samples from token files, and each rank's micro-batches from samples.

A sample is a dict of `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each
`[sequence]`; `labels[i]` is the token that follows `tokens[i]`. With `data.document_mask` there are `document_ids`
(int64) as well, and positions restart with each document. A micro-batch has the same keys, each
`[micro_batch, sequence]`, and `sample_ids` (int64) `[micro_batch]`: the index of each row's sample, counted from
`FIRST_HELDOUT` in held-out ones, and `PADDING` for rows that only fill up the micro-batch. Index and `fingerprint`
identify a sample in any layout.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.tokens import Corpus
from minitron_megatron.errors import DataError
from minitron_megatron.parallel.schedule import PADDING, SAMPLE_IDS

FIRST_HELDOUT = 2**40
"""Id of the first held-out sample in a run whose training samples are numbered from 0."""


class Samples(Protocol):
    """A sequence of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...


def training_samples(corpus: Corpus, config: DataConfig, num_samples: int) -> "TrainingSamples":
    """Returns Megatron-Core's own shuffled samples of the training tokens, over as many epochs as needed.

    Megatron-Core also blends several token files by their weights; each sample is from one of them. Every rank of an
    initialised `torch.distributed` has to call this: the first one writes the order to `corpus.folder`, the others
    read it.

    Args:
        corpus: the tokens.
        config: its sequence length and seed.
        num_samples: of the whole run, however it is split over ranks and restarts, because the order of the samples
            depends on it. The result may hold more.

    Raises:
        DataError: a file of training tokens is shorter than a sequence plus one token.
    """
    for files in corpus.train:
        _require(files.num_tokens, "training", config, " in one of its parts" if len(corpus.train) > 1 else "")
    # Megatron-Core needs only the identity of the tokenizer, to name its cache.
    tokenizer = SimpleNamespace(
        unique_identifiers={"fingerprint": corpus.tokenizer_fingerprint}, vocab_size=None, eod=None
    )
    prefixes = [files.prefix for files in corpus.train]
    settings = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.sequence_length,
        blend_per_split=[(prefixes, corpus.weights if len(prefixes) > 1 else None), None, None],
        path_to_cache=str(corpus.folder / "index"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=_surplus(corpus.weights, num_samples),
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, settings).build()
    # Megatron-Core shuffles over all epochs, so the order also depends on their number.
    order = {"weights": corpus.weights, "seed": config.seed, "num_samples": num_samples}
    return TrainingSamples(train, config.document_mask, _fingerprint(corpus, "train", config, order))


def _fingerprint(corpus: Corpus, side: str, config: DataConfig, order: Mapping[str, object]) -> str:
    """Returns a hash of everything that decides the tokens of sample i, and which of them count."""
    content = {
        "corpus": corpus.fingerprint,
        "side": side,
        "sequence_length": config.sequence_length,
        "document_mask": config.document_mask,
        **order,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _surplus(weights: list[float], num_samples: int) -> float:
    """Returns by how much each part of a blend must exceed its share of the samples, so that none runs out.

    Megatron-Core rounds every part's share up, fills the blend to their sum and then takes parts by their weights.
    """
    shares = [weight / sum(weights) for weight in weights]
    return max((share * len(shares) + 1) / max(1, share * num_samples) for share in shares)


class TrainingSamples:
    """Samples of Megatron-Core's dataset, with the mask of tokens that are not learned; see `encoding`.

    Attributes:
        fingerprint: identifies a sample together with its index; see `training_samples`.
    """

    def __init__(self, dataset: GPTDataset | BlendedDataset, document_mask: bool, fingerprint: str):
        self.dataset = dataset
        self.document_mask = document_mask
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        dataset = self.dataset
        if isinstance(dataset, BlendedDataset):
            dataset, index = dataset.datasets[dataset.dataset_index[index]], int(dataset.dataset_sample_index[index])
        item = dataset[index]
        window = torch.cat([item["tokens"], item["labels"][-1:]])
        lengths = _document_lengths(dataset, index) if self.document_mask else None
        # Megatron-Core reads ~0 = -1 as padding and returns token 0 with a mask of 0, which is right here.
        return _sample(window, item["loss_mask"].bool(), lengths)


def _document_lengths(dataset: GPTDataset, index: int) -> list[int]:
    """Returns the number of tokens of each document in the window of a sample."""
    index = dataset.shuffle_index[index]
    (first, begin), (last, end) = dataset.sample_index[index].tolist(), dataset.sample_index[index + 1].tolist()
    lengths = dataset.dataset.sequence_lengths[dataset.document_index[first : last + 1]].astype(np.int64)
    lengths[-1] = end + 1  # the window's last token is the next one's first
    lengths[0] -= begin
    return lengths.tolist()


def _sample(window: Tensor, counts: Tensor, lengths: list[int] | None) -> dict[str, Tensor]:
    """Makes a sample from a window of tokens.

    Args:
        window: `[sequence + 1]`, negative for tokens that are not learned.
        counts: bool `[sequence]`, false where there is nothing to predict.
        lengths: tokens of each document in the window, with `data.document_mask`.
    """
    counts = counts & (window[1:] >= 0)
    tokens = torch.where(window < 0, ~window, window)
    positions = torch.arange(len(window) - 1)
    sample = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": counts.float(), "position_ids": positions}
    if lengths is not None:
        lengths = torch.tensor(lengths)
        ids = torch.arange(len(lengths)).repeat_interleave(lengths)
        starts = lengths.cumsum(0) - lengths
        # The first token of a document cannot be predicted from another document.
        sample["loss_mask"] *= ids[1:] == ids[:-1]
        sample["position_ids"] = positions - starts[ids[:-1]]
        sample["document_ids"] = ids[:-1]
    return sample


def heldout_samples(corpus: Corpus, config: DataConfig, num_samples: int | None = None) -> "HeldoutSamples":
    """Returns the held-out tokens as windows in which every token but the first is predicted exactly once.

    Args:
        corpus: the tokens.
        config: its sequence length and document mask.
        num_samples: use at most this many, from the beginning; None for all.

    Raises:
        DataError: there are fewer tokens than a sequence plus one.
    """
    _require(corpus.num_heldout_tokens, "held-out", config)
    return HeldoutSamples(corpus, config, num_samples)


def _require(num_tokens: int, side: str, config: DataConfig, where: str = "") -> None:
    needed = config.sequence_length + 1
    if num_tokens < needed:
        raise DataError(
            f"the corpus has {num_tokens} {side} tokens{where}, but data.sequence_length = {config.sequence_length} "
            f"needs {needed}: add text, shorten the sequences or change data.heldout_pct"
        )


class HeldoutSamples:
    """Windows of `sequence_length + 1` tokens at a stride of `sequence_length`; the last one is padded.

    Attributes:
        fingerprint: identifies a sample together with its index.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, num_samples: int | None = None):
        sequence_length = config.sequence_length
        self.sequence_length = sequence_length
        self.document_mask = config.document_mask
        self.fingerprint = _fingerprint(corpus, "heldout", config, {})
        self.num_tokens = corpus.num_heldout_tokens
        num_windows = -(-(self.num_tokens - 1) // sequence_length)
        self.num_samples = num_windows if num_samples is None else min(num_samples, num_windows)
        self.files = [IndexedDataset(files.prefix) for files in corpus.heldout]
        self.firsts = np.cumsum([0, *(len(file) for file in self.files)])
        # End of each document in the tokens of all files.
        self.ends = np.cumsum(np.concatenate([file.sequence_lengths for file in self.files]), dtype=np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        first = index * self.sequence_length
        num_predicted = min(self.sequence_length, self.num_tokens - 1 - first)
        parts = list(self._parts(first, first + num_predicted + 1))
        padding = np.zeros(self.sequence_length - num_predicted, dtype=np.int64)
        window = np.concatenate([*parts, padding], dtype=np.int64)
        counts = torch.arange(self.sequence_length) < num_predicted
        lengths = [*map(len, parts), len(padding)] if self.document_mask else None
        return _sample(torch.from_numpy(window), counts, lengths)

    def _parts(self, first: int, end: int) -> Iterator[np.ndarray]:
        """Yields the documents between two positions; the first and the last one are cut there.

        The arrays are views of a file map that Megatron-Core closes with the dataset, so the caller has to copy.
        """
        document = int(np.searchsorted(self.ends, first, side="right"))
        while first < end:
            file = int(np.searchsorted(self.firsts, document, side="right")) - 1
            last = int(min(self.ends[document], end))
            length = int(self.files[file].sequence_lengths[document - self.firsts[file]])
            offset = first - (int(self.ends[document]) - length)
            yield self.files[file].get(document - self.firsts[file], offset, last - first)
            first, document = last, document + 1


def require_tokens(samples: Samples, what: str, count: int | None = None) -> None:
    """Checks that there is something to learn or to measure. Reads samples up to the first with a token that counts.

    Args:
        samples: of any kind.
        what: they are, for the message.
        count: look at this many, from the beginning; None for all.

    Raises:
        DataError: the loss masks are zero throughout.
    """
    num_samples = len(samples) if count is None else min(count, len(samples))
    if not any(samples[index]["loss_mask"].any() for index in range(num_samples)):
        raise DataError(
            f"none of the {num_samples} {what} sequences has a token that counts: data.text must have text, or "
            f"conversations with answers of the assistant, to learn and to measure; see also data.sequence_length"
        )


def rank_batches(
    dataset: Samples, first: int, count: int, micro_batch: int, data_rank: int, data_size: int, first_id: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Yields one data-parallel rank's micro-batches of samples `first` to `first + count`.

    Row j of micro-batch m on rank d is sample `first + (m * data_size + d) * micro_batch + j`. Where the
    range or the dataset ends earlier the row repeats the last sample with a loss mask of zeros and `PADDING` as its id,
    so that every rank has the same number of micro-batches and no token counts twice.

    Args:
        dataset: the samples, the same on all ranks.
        first: the first sample.
        count: samples over all ranks.
        micro_batch: samples per micro-batch.
        data_rank: this rank's place among the replicas.
        data_size: number of replicas.
        first_id: id of the dataset's sample 0.

    Yields:
        dicts of `[micro_batch, sequence]`, and the rows' `sample_ids` `[micro_batch]`.
    """
    end = min(first + count, len(dataset))
    for start in range(first, end, micro_batch * data_size):
        own = start + data_rank * micro_batch
        indices = range(own, own + micro_batch)
        rows = [_row(dataset, index, end) for index in indices]
        ids = torch.tensor([first_id + index if index < end else PADDING for index in indices])
        yield {**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}, SAMPLE_IDS: ids}


def _row(dataset: Samples, index: int, end: int) -> Mapping[str, Tensor]:
    if index < end:
        return dataset[index]
    last = dataset[end - 1]
    return {**last, "loss_mask": torch.zeros_like(last["loss_mask"])}
