"""Makes token files in Megatron's own format from all sources: for training, and held out.

All text goes to one folder, and each pre-tokenised corpus to one of its own. The folders are named by a hash of their
content, or of path, size and mtime of files that are only linked to:

    CACHE_DIR/FINGERPRINT/
        manifest.json
        train.bin   train.idx       one sequence per document, each closed by the end-of-sequence token;
                                    of weighted sources train_0, train_1, ...
        heldout.bin heldout.idx
        index/                      sample orders, written by Megatron-Core

A link beside them, named by a hash of paths, sizes and mtimes of the text files, leads to their folder, so that text is
read only once.
"""

import hashlib
import json
import logging
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from transformers import PreTrainedTokenizerBase

from minitron_megatron import __version__
from minitron_megatron.artifacts.files import replacing, write_json
from minitron_megatron.artifacts.manifest import MANIFEST
from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.corpus import Document, documents, file_stats
from minitron_megatron.data.encoding import encode, load_tokenizer, num_token_ids, num_workers, tokenizer_fingerprint
from minitron_megatron.data.indexed import is_indexed, read_index, scan_documents
from minitron_megatron.disk import convert_enospc
from minitron_megatron.errors import DataError
from minitron_megatron.progress import progress

logger = logging.getLogger(__name__)

_HELDOUT = "heldout"
_LOG_EVERY = 2**17  # documents of a part, as long as their total is unknown
_FORMAT = 2  # part of the fingerprint: increase it when the same documents would be written differently


@dataclass(frozen=True)
class TokenFiles:
    """A pair of token files.

    Attributes:
        prefix: their path without `.bin` and `.idx`.
        num_tokens: end-of-sequence tokens included.
        num_documents: each one sequence.
    """

    prefix: str
    num_tokens: int
    num_documents: int


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus on disk.

    Attributes:
        folder: for sample orders; an absolute path.
        fingerprint: of the documents, their split and the tokenizer.
        tokenizer_fingerprint: of the tokenizer that made it.
        train, heldout: its token files.
        weights: relative sampling weight of each of `train`.
    """

    folder: Path
    fingerprint: str
    tokenizer_fingerprint: str
    train: list[TokenFiles]
    heldout: list[TokenFiles]
    weights: list[float]

    @property
    def num_train_tokens(self) -> int:
        return sum(files.num_tokens for files in self.train)

    @property
    def num_heldout_tokens(self) -> int:
        return sum(files.num_tokens for files in self.heldout)

    def num_sequences(self, length: int) -> int:
        """Returns the number of training sequences without repetition; the last one needs one more token."""
        total = sum(self.weights)
        counts = ((files.num_tokens - 1) // length for files in self.train)
        if len(self.train) == 1:
            return next(counts)
        return min(int(count * total / weight) for count, weight in zip(counts, self.weights, strict=True))


def prepare_corpus(config: DataConfig, tokenizer_dir: Path) -> Corpus:
    """Tokenises and splits the documents, or reuses the result of an earlier run.

    Several processes may call this at once: each does the whole work and the first to finish wins. Let one process go
    first if the work is large.

    Args:
        config: which documents, and how they are split.
        tokenizer_dir: Hugging Face folder of the tokenizer.

    Raises:
        DataError: a source, the tokenizer or the corpus is damaged, there are fewer than two documents, or a corpus is
            tokenised with another tokenizer.
        DiskSpaceError: the disk of the cache is full.
        LostWorkerError: a tokenizer process was killed.
    """
    fingerprint = tokenizer_fingerprint(tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {tokenizer_dir} has no end-of-sequence token: set eos_token in tokenizer_config.json"
        )
    settings = {
        "format": _FORMAT,
        "heldout_pct": float(config.heldout_pct),
        "seed": config.seed,
        "tokenizer_fingerprint": fingerprint,
        "eos_token_id": tokenizer.eos_token_id,
    }
    texts = [name for name in config.text if not is_indexed(name)]
    indexed = [name for name in config.text if is_indexed(name)]
    folders = []
    if texts:
        parts = [[name] for name in texts] if config.weights else [texts]
        folders.append(_prepare_text(parts, config, tokenizer_dir, tokenizer, settings))
    folders += [_prepare_indexed(Path(name).resolve(), config, tokenizer, settings) for name in indexed]

    train, heldout = [], []
    for folder in folders:
        *own, last = _read(folder)
        train += own
        heldout.append(last)
    if config.weights:
        by_source = zip(config.text, config.weights, strict=True)
        weights = [weight for _, weight in sorted(by_source, key=lambda pair: is_indexed(pair[0]))]  # as `train`
    else:
        weights = [float(files.num_tokens) for files in train]
    folder = folders[0]
    if len(folders) > 1:
        names = " ".join(folder.name for folder in folders)
        folder = folder.with_name(hashlib.sha256(names.encode()).hexdigest())
    return Corpus(folder, folder.name, fingerprint, train, heldout, weights)


def _prepare_text(
    parts: list[list[str]], config: DataConfig, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerBase, settings: dict
) -> Path:
    """Returns the folder with the documents of all parts, each with training files of its own."""
    link = _link(parts, config, tokenizer, settings)
    if link.exists():
        return link.resolve()
    keys, num_characters, has_chat = [], 0, False
    for part in parts:
        own = array("Q")
        for document in documents(part, config.text_field):
            own.append(_split_key(document, config.seed))
            num_characters += len(document.text)
            has_chat |= document.is_chat
            if len(own) % _LOG_EVERY == 0:
                logger.info("reading documents: %d", len(own))
        keys.append(np.array(own, dtype=np.uint64))
    settings = settings | {"documents": [hashlib.sha256(own.tobytes()).hexdigest() for own in keys]}
    if has_chat:
        settings["chat_template"] = str(tokenizer.chat_template)
    folder = _folder(config, settings)
    if folder.exists():
        _set_link(link, folder)
        return folder
    heldout = _heldout_keys(np.concatenate(keys), config, str(config.text))
    for part, own in zip(parts, keys, strict=True):
        if np.isin(own, heldout).all():
            raise DataError(
                f"data.text names {part[0]}, of which nothing is left to train on: its documents are all held out, or "
                f"there are none"
            )
    chosen = set(heldout.tolist())
    dtype = np.int32 if has_chat else DType.optimal_dtype(num_token_ids(tokenizer))
    workers = num_workers(config.workers, num_characters)
    names = ["train"] if len(parts) == 1 else [f"train_{number}" for number in range(len(parts))]
    with _new_corpus(folder, config, settings) as (partial, counts):
        files = {name: _Files(partial / name, dtype) for name in [*names, _HELDOUT]}
        with progress("tokenising documents", sum(map(len, keys))) as advance:
            everything = chain.from_iterable(documents(part, config.text_field) for part in parts)
            places = chain.from_iterable(repeat(name, len(own)) for name, own in zip(names, keys, strict=True))
            for name, (document, row) in zip(places, encode(everything, tokenizer_dir, dtype, workers), strict=True):
                files[_HELDOUT if _split_key(document, config.seed) in chosen else name].add(document, row)
                advance()
        counts.update({name: own.close() for name, own in files.items()})
    _set_link(link, folder)
    return folder


def _link(parts: list[list[str]], config: DataConfig, tokenizer: PreTrainedTokenizerBase, settings: dict) -> Path:
    """Returns the path of a link to the folder, named by what is known of the documents without reading them."""
    stats = [file_stats(part) for part in parts]
    read_as = [config.text_field, str(tokenizer.chat_template), sys.version]  # the last for `builtin`
    return _folder(config, settings | {"parts": parts, "stats": stats, "read_as": read_as})


def _set_link(link: Path, folder: Path) -> None:
    with suppress(OSError):  # another process was faster, or the cache is read-only and text is read every time
        link.unlink(missing_ok=True)  # its folder may have been deleted
        link.symlink_to(folder.name)


def _prepare_indexed(prefix: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase, settings: dict) -> Path:
    """Returns the folder with the split of a pre-tokenised corpus. Its tokens stay where they are."""
    read_index(prefix)
    stats = [Path(f"{prefix}.{suffix}").stat() for suffix in ("bin", "idx")]
    settings = settings | {"prefix": str(prefix), "files": [[stat.st_size, stat.st_mtime_ns] for stat in stats]}
    folder = _folder(config, settings)
    if not folder.exists():
        corpus = scan_documents(prefix, config.seed, num_token_ids(tokenizer), tokenizer.eos_token_id)
        is_heldout = np.isin(corpus.keys, _heldout_keys(corpus.keys, config, str(prefix)))
        with _new_corpus(folder, config, settings) as (partial, counts):
            counts["train"] = corpus.write(partial / "train", ~is_heldout)
            counts[_HELDOUT] = corpus.write(partial / _HELDOUT, is_heldout)
    return folder


def _split_key(document: Document, seed: int) -> int:
    """Hashes a document to its place in the order of the split; equal documents share one."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{document.text}".encode()).digest()[:8], "big")


def _heldout_keys(keys: np.ndarray, config: DataConfig, source: str) -> np.ndarray:
    """Returns the keys of the held-out documents: the first `heldout_pct` of the distinct ones."""
    distinct = np.unique(keys)
    if not len(distinct):
        raise DataError(f"data.text = {source} has no text in it: name other files")
    if len(distinct) == 1:
        raise DataError(
            f"data.text = {source} is one document, so that none could be held out: add others or cut it up"
        )
    return distinct[: max(1, round(len(distinct) * config.heldout_pct / 100))]


class _Files:
    """Writes one pair of token files, and counts documents, tokens and bytes."""

    def __init__(self, prefix: Path, dtype: type[np.integer]):
        self.prefix = prefix
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def add(self, document: Document, row: np.ndarray) -> None:
        self.builder.add_document(row, [len(row)])
        self.counts["documents"] += 1
        self.counts["tokens"] += len(row)
        self.counts["bytes"] += len(document.text.encode())

    def close(self) -> dict[str, int]:
        self.builder.finalize(f"{self.prefix}.idx")
        return self.counts


def _folder(config: DataConfig, settings: dict) -> Path:
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path(config.cache_dir).resolve() / fingerprint


@contextmanager
def _new_corpus(folder: Path, config: DataConfig, settings: dict) -> Iterator[tuple[Path, dict]]:
    """Yields a temporary folder that becomes `folder` in one step, and a dict for the counts of its files."""
    logger.info("preparing tokens in %s", folder)
    counts: dict[str, dict[str, int]] = {}
    with convert_enospc(folder):
        try:
            with replacing(folder) as partial:
                partial.mkdir(parents=True)
                yield partial, counts
                made_of = {"text": config.text, **settings}
                details = {"fingerprint": folder.name, "files": counts}
                manifest = {"kind": "corpus", "config": made_of, "details": details, "version": __version__}
                write_json(partial / MANIFEST, manifest)
        except OSError:
            if not folder.exists():  # otherwise another process was faster with the same corpus
                raise


def _read(folder: Path) -> list[TokenFiles]:
    """Returns the token files of a folder, the held-out ones last."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        token_files = []
        for name, counts in manifest["details"]["files"].items():
            read_index(folder / name, contiguous=False)
            token_files.append(TokenFiles(str(folder / name), counts["tokens"], counts["documents"]))
    except (OSError, DataError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is not a whole corpus, {error}: delete it") from error
    return token_files
