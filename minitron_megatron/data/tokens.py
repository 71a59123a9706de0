"""Makes token files in Megatron's own format from all sources: for training, and held out.

All text goes to one folder, and each pre-tokenised corpus to one of its own. The folders are named by a hash of their
content, and of the path of files that are only linked to:

    CACHE_DIR/FINGERPRINT/
        manifest.json
        train.bin   train.idx       one sequence per document, each closed by the end-of-sequence token;
                                    of weighted sources train_0, train_1, ...
        heldout.bin heldout.idx
        index/                      sample orders, written by Megatron-Core

A link beside them, named by a hash of paths, sizes and mtimes of the text files, leads to their folder, so that text is
read only once. A folder that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import tokenizers
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from minitron_megatron import __version__
from minitron_megatron.artifacts.fingerprint import fingerprint as content_fingerprint
from minitron_megatron.artifacts.manifest import MANIFEST
from minitron_megatron.config.common import OnBadRow
from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.chat import template_columns
from minitron_megatron.data.corpus import documents, file_stats, left_out
from minitron_megatron.data.encoding import (
    encode,
    load_tokenizer,
    num_token_ids,
    num_workers,
    require_end_token,
    tokenizer_fingerprint,
)
from minitron_megatron.data.indexed import is_indexed, read_index, scan_documents
from minitron_megatron.data.rows import Document, RowError, RowReport
from minitron_megatron.data.token_files import TokenFiles, drop_damaged_orders, whole
from minitron_megatron.disk import convert_enospc
from minitron_megatron.errors import DataError
from minitron_megatron.files import replacing, write_json
from minitron_megatron.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_HELDOUT = "heldout"
_LOG_EVERY = 2**17  # documents of a part, as long as their total is unknown
_FORMAT = 2  # part of the fingerprint: increase it when the same documents would be written differently


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
    require_end_token(tokenizer, tokenizer_dir)
    settings = {
        "format": _FORMAT,
        "heldout_pct": float(config.heldout_pct),
        "seed": config.seed,
        "tokenizer_fingerprint": fingerprint,
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizers": tokenizers.__version__,
    }
    texts = [name for name in config.text if not is_indexed(name)]
    indexed = [name for name in config.text if is_indexed(name)]
    made = []
    if texts:
        parts = [[name] for name in texts] if config.weights else [texts]
        made.append(whole(partial(_prepare_text, parts, config, tokenizer_dir, tokenizer, settings)))
    for name in indexed:
        prefix = Path(name).resolve()
        made.append(whole(partial(_prepare_indexed, prefix, config, tokenizer, settings)))

    train, heldout = [], []
    for part in made:
        *own, last = part.files
        train += own
        heldout.append(last)
    if config.weights:
        by_source = zip(config.text, config.weights, strict=True)
        weights = [weight for _, weight in sorted(by_source, key=lambda pair: is_indexed(pair[0]))]  # as `train`
    else:
        weights = [float(files.num_tokens) for files in train]
    folder, content = made[0].folder, made[0].fingerprint
    if len(made) > 1:
        folder = folder.with_name(_hash_of([part.folder.name for part in made]))
        content = _hash_of([part.fingerprint for part in made])
    drop_damaged_orders(folder)
    return Corpus(folder, content, fingerprint, train, heldout, weights)


def _hash_of(names: list[str]) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()


def _prepare_text(
    parts: list[list[str]], config: DataConfig, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerBase, settings: dict
) -> Path:
    """Returns the folder with the documents of all parts, each with training files of its own."""
    for phrase in left_out([name for part in parts for name in part]):
        logger.warning("not read: %s", phrase)
    link = _link(parts, config, tokenizer, settings)
    if link.exists():
        RowReport.read(_report_file(link)).log()
        return link.resolve()
    columns = template_columns(tokenizer)
    report = RowReport(config.on_bad_row)
    keys, num_characters, has_chat = _read_once(parts, config, columns, report)
    settings = settings | {"documents": [hashlib.sha256(own.tobytes()).hexdigest() for own in keys]}
    if has_chat:
        settings |= {
            "chat_template": str(tokenizer.chat_template),
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "rendered_by": [version("transformers"), jinja2.__version__],
        }
        if config.on_bad_row is not OnBadRow.ERROR:
            settings["on_bad_row"] = config.on_bad_row.value
    folder = _folder(config, settings)
    if folder.exists():
        _set_link(link, folder, report)
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
    # What is bad or empty was counted above.
    silent = RowReport(config.on_bad_row)
    with _new_corpus(folder, folder.name, config, settings) as (unfinished, counts):
        files = {name: _Files(unfinished / name, dtype) for name in [*names, _HELDOUT]}
        with progress("tokenising documents", sum(map(len, keys))) as advance:
            everything = chain.from_iterable(documents(part, config.text_field, columns, silent) for part in parts)
            places = chain.from_iterable(repeat(name, len(own)) for name, own in zip(names, keys, strict=True))
            for name, (document, row) in zip(places, encode(everything, tokenizer_dir, dtype, workers), strict=True):
                if isinstance(row, RowError):
                    report.add(row)
                else:
                    files[_HELDOUT if _split_key(document, config.seed) in chosen else name].add(document, row)
                advance()
        counts.update({name: own.close() for name, own in files.items()})
        _require_documents(counts, config)
    _set_link(link, folder, report)
    return folder


def _read_once(
    parts: list[list[str]], config: DataConfig, columns: list[str], report: RowReport
) -> tuple[list[np.ndarray], int, bool]:
    """Returns the split keys of every part's documents, their characters, and whether there are conversations."""
    keys, num_characters, has_chat = [], 0, False
    for part in parts:
        own = array("Q")
        for document in documents(part, config.text_field, columns, report):
            own.append(_split_key(document, config.seed))
            num_characters += len(document.text)
            has_chat |= document.is_chat
            if len(own) % _LOG_EVERY == 0:
                logger.info("reading documents: %d", len(own))
        keys.append(np.array(own, dtype=np.uint64))
    return keys, num_characters, has_chat


def _require_documents(counts: dict[str, dict[str, int]], config: DataConfig) -> None:
    """Checks that skipping conversations has left some documents on each side.

    Raises:
        DataError: it has not.
    """
    for name, own in counts.items():
        if not own["documents"]:
            raise DataError(
                f"data.text = {config.text}: data.on_bad_row=skip leaves no document in {name}: fix the rows, or "
                f"change data.heldout_pct or data.seed"
            )


def _link(parts: list[list[str]], config: DataConfig, tokenizer: PreTrainedTokenizerBase, settings: dict) -> Path:
    """Returns the path of a link to the folder, named by what is known of the documents without reading them."""
    stats = [file_stats(part) for part in parts]
    read_as = [
        config.text_field,
        config.on_bad_row.value,
        str(tokenizer.chat_template),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        [sys.version, version("transformers"), jinja2.__version__],  # the first for `builtin`
    ]
    return _folder(config, settings | {"parts": parts, "stats": stats, "read_as": read_as})


def _report_file(link: Path) -> Path:
    return link.with_name(f"{link.name}.rows.json")


def _set_link(link: Path, folder: Path, report: RowReport) -> None:
    """Logs what was left out, and keeps it with the link, for the next time."""
    report.log()
    with suppress(OSError):  # another process was faster, or the cache is read-only and text is read every time
        report.write(_report_file(link))
        link.unlink(missing_ok=True)  # its folder may have been deleted
        link.symlink_to(folder.name)


def _prepare_indexed(prefix: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase, settings: dict) -> Path:
    """Returns the folder with the split of a pre-tokenised corpus. Its tokens stay where they are."""
    read_index(prefix)
    settings = settings | {"content": [content_fingerprint(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")]}
    content = _folder(config, settings).name
    settings["prefix"] = str(prefix)  # the folder links to it
    folder = _folder(config, settings)
    if not folder.exists():
        corpus = scan_documents(prefix, config.seed, num_token_ids(tokenizer), tokenizer.eos_token_id)
        is_heldout = np.isin(corpus.keys, _heldout_keys(corpus.keys, config, str(prefix)))
        with _new_corpus(folder, content, config, settings) as (unfinished, counts):
            counts["train"] = corpus.write(unfinished / "train", ~is_heldout)
            counts[_HELDOUT] = corpus.write(unfinished / _HELDOUT, is_heldout)
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
def _new_corpus(folder: Path, fingerprint: str, config: DataConfig, settings: dict) -> Iterator[tuple[Path, dict]]:
    """Yields a temporary folder that becomes `folder` in one step, and a dict for the counts of its files."""
    logger.info("preparing tokens in %s", folder)
    counts: dict[str, dict[str, Any]] = {}
    with convert_enospc(folder):
        try:
            with replacing(folder) as unfinished:
                unfinished.mkdir(parents=True)
                yield unfinished, counts
                for name, own in counts.items():
                    files = [f"{name}.{suffix}" for suffix in ("bin", "idx")]
                    own["content"] = {file: content_fingerprint(unfinished / file) for file in files}
                made_of = {"text": config.text, **settings}
                details = {"fingerprint": fingerprint, "files": counts}
                manifest = {"kind": "corpus", "config": made_of, "details": details, "version": __version__}
                write_json(unfinished / MANIFEST, manifest)
        except OSError:
            if not folder.exists():  # otherwise another process was faster with the same corpus
                raise
