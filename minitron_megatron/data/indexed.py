"""Megatron's token files: `PREFIX.bin` with the tokens and `PREFIX.idx` with where each sequence lies.

    PREFIX.idx   9 bytes MMIDIDX\\0\\0, uint64 version, uint8 dtype code, uint64 sequences S, uint64 D,
                 int32 lengths [S] in tokens, int64 pointers [S] in bytes, int64 documents [D], as ends of sequences

Megatron-Core maps both without checks, so everything is checked here first.
"""

import hashlib
import logging
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from minitron_megatron.errors import DataError
from minitron_megatron.progress import progress

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# Megatron-Core's integer dtype codes; 6 and 7 are floats.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_BLOCK = 2**20  # entries that are checked at a time


def is_indexed(name: str) -> bool:
    """Returns whether a source is a prefix of token files, as preprocess_data.py writes them: no `.bin` or `.idx`."""
    return not Path(name).exists() and (Path(f"{name}.idx").exists() or Path(f"{name}.bin").exists())


@dataclass
class Index:
    """An `.idx` file, memory-mapped.

    Attributes:
        prefix: of both files.
        dtype: of the tokens.
        lengths: int32 `[sequence]`, in tokens.
        pointers: int64 `[sequence]`, in bytes.
        documents: int64 `[document + 1]`, the first sequence of each document, and the number of sequences.
    """

    prefix: Path
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray

    def tokens(self) -> np.ndarray:
        """Maps all tokens."""
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")


def read_index(prefix: Path, contiguous: bool = True) -> Index:
    """Maps an `.idx` file after checking it against its own length and that of its `.bin`.

    Args:
        prefix: path of both files, without `.idx` and `.bin`.
        contiguous: whether the sequences must fill the `.bin` file without gaps, as Megatron's tools write them.

    Raises:
        DataError: a file is missing or damaged, or the two do not match.
    """
    file = Path(f"{prefix}.idx")
    try:
        size, bin_size = file.stat().st_size, Path(f"{prefix}.bin").stat().st_size
        with open(file, "rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{prefix} needs both a .bin and an .idx file: {error}") from error
    if len(header) < _HEADER.size:
        raise _damaged(prefix, f"it has {size} bytes, fewer than a header")
    magic, version, code, num_sequences, num_documents = _HEADER.unpack(header)
    if magic != _MAGIC or version != _VERSION:
        raise _damaged(prefix, "it does not begin as version 1 of the format does")
    if code not in _DTYPES:
        raise _damaged(prefix, f"dtype code {code} is not that of a whole number")
    wanted = _HEADER.size + 12 * num_sequences + 8 * num_documents
    if size != wanted:
        raise _damaged(
            prefix,
            f"{num_sequences} sequences and {num_documents} document ends take {wanted} bytes, and it has {size}",
        )
    if num_sequences < 1 or num_documents < 2 or not bin_size:
        raise _damaged(prefix, "there is no document")

    def array(dtype: str, count: int, offset: int) -> np.ndarray:
        return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(count,))

    at = _HEADER.size
    index = Index(
        Path(prefix),
        np.dtype(_DTYPES[code]),
        array("<i4", num_sequences, at),
        array("<i8", num_sequences, at + 4 * num_sequences),
        array("<i8", num_documents, at + 12 * num_sequences),
    )
    _check_sequences(index, bin_size, contiguous)
    _check_documents(index)
    return index


def _damaged(prefix: Path, reason: str) -> DataError:
    return DataError(
        f"{prefix}.idx is damaged, or not of {prefix}.bin: {reason}. Copy both again, or write them with "
        f"Megatron-LM's tools/preprocess_data.py"
    )


def _check_sequences(index: Index, bin_size: int, contiguous: bool) -> None:
    """Checks that every sequence lies in the `.bin` file; see `read_index`.

    Raises:
        DataError: one does not.
    """
    prefix, itemsize, end = index.prefix, index.dtype.itemsize, 0
    for first in range(0, len(index.lengths), _BLOCK):
        lengths = index.lengths[first : first + _BLOCK].astype(np.int64)
        pointers = index.pointers[first : first + _BLOCK]
        if lengths.min() < 0:
            raise _damaged(prefix, "it has a sequence of negative length")
        if contiguous:
            ends = end + itemsize * np.cumsum(lengths)
            if pointers[0] != end or (pointers[1:] != ends[:-1]).any():
                raise _damaged(prefix, "its sequences do not follow on each other")
            end = int(ends[-1])
        elif not ((pointers >= 0) & (pointers <= bin_size - itemsize * lengths)).all():
            raise _damaged(prefix, f"it has a sequence beyond the {bin_size} bytes of {prefix}.bin")
    if contiguous and end != bin_size:
        raise _damaged(prefix, f"its sequences take {end} bytes, and {prefix}.bin has {bin_size}")


def _check_documents(index: Index) -> None:
    """Checks that the documents share all sequences among them.

    Raises:
        DataError: they do not.
    """
    bounds = index.documents
    for first in range(0, len(bounds), _BLOCK):
        part = bounds[first : first + _BLOCK + 1]
        if not (part[1:] > part[:-1]).all():
            raise _damaged(index.prefix, "its documents do not follow on each other")
    if bounds[0] != 0 or bounds[-1] != len(index.lengths):
        raise _damaged(index.prefix, "its documents are not all of its sequences")


@dataclass
class Documents:
    """The documents of a tokenised corpus, without empty ones.

    Attributes:
        index: of the corpus.
        pointers: int64 `[document]`, in bytes.
        lengths: int64 `[document]`, in tokens.
        keys: uint64 `[document]`, a hash of seed and tokens.
    """

    index: Index
    pointers: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray

    def write(self, prefix: Path, chosen: np.ndarray) -> dict[str, int]:
        """Writes token files of some documents, one sequence each, whose `.bin` is a link to the corpus.

        Returns:
            the number of `documents`, `tokens` and `bytes`.
        """
        lengths, pointers = self.lengths[chosen], self.pointers[chosen]
        code = next(code for code, name in _DTYPES.items() if np.dtype(name) == self.index.dtype)
        with open(f"{prefix}.idx", "wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
            file.write(lengths.astype("<i4").tobytes())
            file.write(pointers.astype("<i8").tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        os.symlink(Path(f"{self.index.prefix}.bin").resolve(), f"{prefix}.bin")
        num_tokens = int(lengths.sum())
        return {"documents": len(lengths), "tokens": num_tokens, "bytes": num_tokens * self.index.dtype.itemsize}


def scan_documents(prefix: Path, seed: int, num_ids: int, eos: int) -> Documents:
    """Reads a tokenised corpus once, to check its token ids and to hash its documents.

    Args:
        prefix: of its files.
        seed: of the keys.
        num_ids: upper bound of the token ids, exclusive.
        eos: end-of-sequence token that documents should end with.

    Raises:
        DataError: the files are damaged, or a token id is not the tokenizer's.
    """
    index = read_index(prefix)
    bounds = np.zeros(len(index.lengths) + 1, dtype=np.int64)
    np.cumsum(index.lengths, dtype=np.int64, out=bounds[1:])
    bounds = bounds[index.documents]  # in tokens
    tokens, itemsize = index.tokens(), index.dtype.itemsize
    view, start = memoryview(tokens).cast("B"), hashlib.sha256(f"{seed}\n".encode())
    keys = np.zeros(len(bounds) - 1, dtype=np.uint64)
    with progress(f"reading {prefix.name}", len(keys)) as advance:
        first = 0
        while first < len(keys):
            last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _BLOCK)) - 1)
            block = tokens[bounds[first] : bounds[last]]
            if len(block) and (block.max() >= num_ids or block.min() < 0):
                wrong = int(np.flatnonzero((block >= num_ids) | (block < 0))[0])
                number = int(np.searchsorted(bounds, bounds[first] + wrong, side="right")) - 1
                raise DataError(
                    f"{prefix}, document {number}: token {block[wrong]} is none of the tokenizer, whose ids end at "
                    f"{num_ids - 1}: tokenise the text with the model's own tokenizer"
                )
            ends = (bounds[first : last + 1] * itemsize).tolist()
            for number, (begin, end) in enumerate(pairwise(ends), start=first):
                digest = start.copy()
                digest.update(view[begin:end])
                keys[number] = int.from_bytes(digest.digest()[:8], "big")
            advance(last - first)
            first = last
    lengths = np.diff(bounds)
    full = np.flatnonzero(lengths)
    if (lengths > np.iinfo(np.int32).max).any():
        raise DataError(f"{prefix} has a document of more than 2^31 tokens: cut it up")
    closed = int((tokens[bounds[1:][full] - 1] == eos).sum())
    if closed < len(full):
        logger.warning(
            "%s: %d of %d documents do not end with the end-of-sequence token %d; preprocess_data.py adds it with "
            "--append-eod",
            prefix,
            len(full) - closed,
            len(full),
            eos,
        )
    return Documents(index, bounds[:-1][full] * itemsize, lengths[full], keys[full])
