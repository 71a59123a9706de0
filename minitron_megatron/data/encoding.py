"""Tokenises documents to rows of token ids, in one process or several.

A token t that is not learned, such as those of a user's messages, is stored as its bitwise complement `~t`, which is
negative. So one file holds tokens and mask, in whatever order Megatron-Core reads it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minitron_megatron.data.chat import render_chat
from minitron_megatron.data.rows import Document, RowError
from minitron_megatron.errors import DataError, LostWorkerError
from minitron_megatron.files import read_json
from minitron_megatron.process import import_heavy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FAST = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_BATCH = 64  # documents per tokenizer call, enough to keep its threads busy
# Starting a process takes as long as the tokenizer's own threads need for about this much text.
_CHARACTERS_PER_WORKER = 2**24


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer in a Hugging Face folder, without running any code from there."""
    # Not every verb needs it, and it takes a second to load.
    auto = import_heavy("transformers.models.auto.tokenization_auto").AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return tokenizer


def require_end_token(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Checks that documents can be closed.

    Raises:
        DataError: there is no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {folder} has no end-of-sequence token, which closes every document: set eos_token in "
            f"tokenizer_config.json"
        )


def tokenizer_fingerprint(tokenizer_dir: Path) -> str:
    """Returns a hash of a tokenizer: equal for two folders only if they tokenise every text alike.

    It is of the tokenizer as transformers loads it, from whatever files, so that it does not depend on how they are
    written.

    Raises:
        DataError: the folder holds no `tokenizer.json`.
    """
    file = Path(tokenizer_dir) / _FAST
    if not file.is_file():
        raise DataError(
            f"{file} does not exist: put the tokenizer there, as the files tokenizer.json and tokenizer_config.json "
            f"that a fast tokenizer's `save_pretrained` writes"
        )
    tokenizer = load_tokenizer(tokenizer_dir)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The others are of decoding, and of special tokens, padding and truncation, which text is tokenised without.
    content = {part: backend[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    content["split_special_tokens"] = bool(tokenizer.split_special_tokens)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def have_equal_tokenizers(first: Path, second: Path) -> bool:
    """Returns whether two Hugging Face folders tokenise every text alike.

    Tokenizers of equal files are not loaded, for which every rank would import transformers.

    Raises:
        DataError: as of `tokenizer_fingerprint`.
    """
    files = _tokenizer_files(first)
    if _FAST in files and files == _tokenizer_files(second):
        return True
    return tokenizer_fingerprint(first) == tokenizer_fingerprint(second)


def _tokenizer_files(folder: Path) -> dict[str, bytes | str]:
    """Returns what transformers makes a tokenizer of: files by name, and the kind of the model."""
    files = {name: (folder / name).read_bytes() for name in (_FAST, *_SETTINGS) if (folder / name).is_file()}
    config = folder / "config.json"
    kind = read_json(config, "the whole config of a model").get("model_type") if config.is_file() else None
    return {**files, "model_type": str(kind)}


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns one more than the largest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def num_workers(asked: int | None, num_characters: int) -> int:
    """Returns the number of tokenizer processes: as asked, or by the amount of text, at most one per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or max(1, min(cores, num_characters // _CHARACTERS_PER_WORKER))


Encoded = np.ndarray | RowError
"""The row of a document, or why a conversation cannot be taught."""


class Encoder:
    """Tokenises documents to rows of token ids that end with the end-of-sequence token.

    Args:
        tokenizer: with such a token.
        dtype: of the rows; signed if there are conversations.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dtype: type[np.integer]):
        self.tokenizer = tokenizer
        self.dtype = dtype

    def __call__(self, batch: list[Document]) -> list[Encoded]:
        """Returns the rows of some documents.

        Raises:
            DataError: there is no chat template for a conversation.
        """
        texts = [document.content for document in batch if not document.is_chat]
        rows = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        eos = self.tokenizer.eos_token_id
        return [
            self._chat(document) if document.is_chat else np.array([*next(rows), eos], dtype=self.dtype)
            for document in batch
        ]

    def _chat(self, document: Document) -> Encoded:
        assert isinstance(document.content, list)
        try:
            tokens, mask = render_chat(self.tokenizer, document.content, document.where, document.extra)
        except RowError as error:
            return error
        if tokens[-1] != self.tokenizer.eos_token_id:
            tokens, mask = [*tokens, self.tokenizer.eos_token_id], [*mask, 0]
        tokens = np.array(tokens, dtype=self.dtype)
        return np.where(mask, tokens, ~tokens)


def encode(
    documents: Iterable[Document], tokenizer_dir: Path, dtype: type[np.integer], workers: int
) -> Iterator[tuple[Document, Encoded]]:
    """Yields every document with its row, in the order of the documents, whatever the number of processes.

    A conversation that cannot be taught comes with its error.

    Args:
        documents: read lazily, only as far ahead as the processes need.
        tokenizer_dir: Hugging Face folder of the tokenizer.
        dtype: see `Encoder`.
        workers: number of processes; 1 for this process with the tokenizer's own threads.

    Raises:
        DataError: see `Encoder`.
        LostWorkerError: a process was killed.
    """
    documents = iter(documents)
    batches = iter(lambda: list(islice(documents, _BATCH)), [])
    if workers == 1:
        encoder = Encoder(load_tokenizer(tokenizer_dir), dtype)
        for batch in batches:
            yield from zip(batch, encoder(batch), strict=True)
        return
    # Threads, of which there are many here, do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_dir, dtype)) as pool:
        pending: deque = deque()
        try:
            for batch in batches:
                pending.append((batch, pool.submit(_encode_here, batch)))
                if len(pending) >= 4 * workers:
                    yield from _finished(pending)
            while pending:
                yield from _finished(pending)
        except BrokenProcessPool as error:
            raise LostWorkerError(
                f"one of the data.workers = {workers} processes that tokenise was ended from outside: see whether the "
                f"memory was enough, and run it again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(pending: deque) -> Iterator[tuple[Document, Encoded]]:
    batch, future = pending.popleft()
    yield from zip(batch, future.result(), strict=True)


_encoder: Encoder  # of a process that `encode` has started


def _start_worker(tokenizer_dir: Path, dtype: type[np.integer]) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use all cores
    _encoder = Encoder(load_tokenizer(tokenizer_dir), dtype)


def _encode_here(batch: list[Document]) -> list[Encoded]:
    return _encoder(batch)
