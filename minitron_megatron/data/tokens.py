"""Documents become two token files in Megatron's own format: one to train on, one held out.

A corpus is a folder that is named by its content:

    CACHE_DIR/FINGERPRINT/
        manifest.json
        train.bin   train.idx       one sequence per document, each closed by the end-of-sequence token
        heldout.bin heldout.idx
        index/                      sample orders, written by Megatron-Core
"""

import hashlib
import json
import logging
import shutil
import uuid
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minitron_megatron import __version__
from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.corpus import documents
from minitron_megatron.disk import told_when_full
from minitron_megatron.errors import DataError
from minitron_megatron.progress import progress

logger = logging.getLogger(__name__)

_SIDES = ("train", "heldout")
_FORMAT = 1  # part of the fingerprint: raise it when equal documents would be written differently
_BATCH = 64  # documents per tokenizer call, enough to keep its threads busy


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus on disk.

    Attributes:
        folder: holds the token files, absolute.
        fingerprint: of the documents, their split and the tokenizer.
        tokenizer_fingerprint: of the tokenizer that made it.
        num_train_tokens: end-of-sequence tokens included.
    """

    folder: Path
    fingerprint: str
    tokenizer_fingerprint: str
    num_train_tokens: int
    num_heldout_tokens: int
    num_train_documents: int
    num_heldout_documents: int

    @property
    def train_prefix(self) -> str:
        """Path of the training tokens, without `.bin` and `.idx`."""
        return str(self.folder / "train")

    @property
    def heldout_prefix(self) -> str:
        """Path of the held-out tokens, without `.bin` and `.idx`."""
        return str(self.folder / "heldout")

    def num_sequences(self, length: int) -> int:
        """How many training sequences there are without repeating any; the last one needs a token more."""
        return (self.num_train_tokens - 1) // length


def prepare_corpus(config: DataConfig, tokenizer_dir: Path) -> Corpus:
    """Tokenise and split the documents, or find that this was done before.

    Several processes may call it at once: each does the work by itself and the first to finish wins. Let
    one go first where that work is large.

    Args:
        config: which documents, and how they are split.
        tokenizer_dir: Hugging Face folder of the tokenizer.

    Raises:
        DataError: a source, the tokenizer or the corpus is not whole, or there are fewer than two documents.
        DiskSpaceError: the disk of the cache is full.
    """
    tokenizer_hash = tokenizer_fingerprint(tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {tokenizer_dir} has no end-of-sequence token: set eos_token in tokenizer_config.json"
        )
    keys = [_split_key(text, config.seed) for text in documents(config.text)]
    settings = {
        "format": _FORMAT,
        "heldout_pct": float(config.heldout_pct),
        "seed": config.seed,
        "tokenizer_fingerprint": tokenizer_hash,
        "eos_token_id": tokenizer.eos_token_id,
        "documents": hashlib.sha256(b"".join(keys)).hexdigest(),
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = Path(config.cache_dir).resolve() / fingerprint
    if not folder.exists():
        with told_when_full(folder):
            _write(folder, config, tokenizer, keys, settings)
    return _read(folder)


def load_tokenizer(folder: Path):
    """The tokenizer in a Hugging Face folder, without running any code that lies there."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def tokenizer_fingerprint(tokenizer_dir: Path) -> str:
    """Hash of a tokenizer: equal for two folders only if they give every text the same tokens.

    Raises:
        DataError: the folder holds no `tokenizer.json`.
    """
    file = Path(tokenizer_dir) / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"{file} does not exist: put the tokenizer there, as the files tokenizer.json and tokenizer_config.json "
            f"that a fast tokenizer's `save_pretrained` writes"
        )
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_enough(corpus: Corpus, sequence_length: int) -> None:
    """Check that both sides fill at least one sequence, which takes one token more than its length.

    Raises:
        DataError: one side is too short.
    """
    for side, num_tokens in (("training", corpus.num_train_tokens), ("held-out", corpus.num_heldout_tokens)):
        if num_tokens < sequence_length + 1:
            raise DataError(
                f"the corpus has {num_tokens} {side} tokens, but data.sequence_length = {sequence_length} needs "
                f"{sequence_length + 1}: add text, shorten the sequences or change data.heldout_pct"
            )


def _split_key(text: str, seed: int) -> bytes:
    """A document's place in the seed's order of all possible documents; equal texts share one."""
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()


def _heldout_keys(keys: list[bytes], config: DataConfig) -> set[bytes]:
    """The split keys of the held-out documents: the first `heldout_pct` of the distinct ones."""
    distinct = sorted(set(keys))
    if not distinct:
        raise DataError(f"data.text = {config.text} has no text in it: name other files")
    if len(distinct) == 1:
        raise DataError(
            f"data.text = {config.text} is one document, so that none could be held out: add others or cut it up"
        )
    return set(distinct[: max(1, round(len(distinct) * config.heldout_pct / 100))])


class _Side:
    """One pair of token files while it is written, and its counts."""

    def __init__(self, prefix: Path, vocab: int):
        self.prefix = prefix
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocab))
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def add(self, text: str, tokens: list[int]) -> None:
        self.builder.add_document(tokens, [len(tokens)])
        self.counts["documents"] += 1
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += len(text.encode())

    def close(self) -> dict[str, int]:
        self.builder.finalize(f"{self.prefix}.idx")
        return self.counts


def _write(folder: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase, keys: list[bytes], settings: dict):
    """Write a whole corpus beside `folder`, then move it there in one step."""
    heldout = _heldout_keys(keys, config)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    logger.info("tokenising %d documents into %s", len(keys), folder)
    try:
        sides = {name: _Side(partial / name, len(tokenizer)) for name in _SIDES}
        texts = documents(config.text)
        with progress("tokenising documents", len(keys)) as advance:
            while batch := list(islice(texts, _BATCH)):
                rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
                for text, tokens in zip(batch, rows):
                    side = "heldout" if _split_key(text, config.seed) in heldout else "train"
                    sides[side].add(text, [*tokens, tokenizer.eos_token_id])
                advance(len(batch))
        details = {"fingerprint": folder.name, **{name: side.close() for name, side in sides.items()}}
        made_of = {"text": config.text, **settings}
        manifest = {"kind": "corpus", "config": made_of, "details": details, "version": __version__}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its corpus is the same one
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(folder: Path) -> Corpus:
    files = ["manifest.json", *(f"{side}.{suffix}" for side in _SIDES for suffix in ("bin", "idx"))]
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise DataError(f"{folder} is not a whole corpus, it lacks {', '.join(missing)}: delete it")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    details = manifest["details"]
    counts = {f"num_{side}_{unit}": details[side][unit] for side in _SIDES for unit in ("tokens", "documents")}
    return Corpus(folder, details["fingerprint"], manifest["config"]["tokenizer_fingerprint"], **counts)
