"""Reads the folders that `tokens` makes; what is damaged there is named and made again."""

import logging
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_megatron.artifacts.fingerprint import fingerprint
from minitron_megatron.artifacts.manifest import MANIFEST
from minitron_megatron.data.indexed import read_index
from minitron_megatron.errors import DataError
from minitron_megatron.files import read_json

logger = logging.getLogger(__name__)


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
class Made:
    """A folder of token files, the fingerprint of their content, and the files, the held-out ones last."""

    folder: Path
    fingerprint: str
    files: list[TokenFiles]


def whole(prepare: Callable[[], Path]) -> Made:
    """Reads the folder that a function makes or finds; one that is damaged is put away and made again.

    Raises:
        DataError: it cannot be put away.
    """
    folder = prepare()
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as damage:
        logger.warning("%s is not a whole corpus (%s): it is made again", folder, damage)
        away = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.damaged")
        try:
            folder.rename(away)
        except OSError as error:
            raise DataError(f"{folder} is not a whole corpus, {damage}: delete it ({error})") from error
        shutil.rmtree(away, ignore_errors=True)
    return _read(prepare())


def _read(folder: Path) -> Made:
    """Reads the manifest of a folder, and checks its token files against it.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    manifest = read_json(folder / MANIFEST, "the manifest of a corpus")
    token_files = []
    for name, counts in manifest["details"]["files"].items():
        index = read_index(folder / name, contiguous=False)
        files = TokenFiles(str(folder / name), counts["tokens"], counts["documents"])
        if (len(index.lengths), int(index.lengths.sum(dtype=np.int64))) != (files.num_documents, files.num_tokens):
            raise DataError(f"{folder / name}.idx is not that of {folder / MANIFEST}")
        for file, content in counts.get("content", {}).items():
            if fingerprint(folder / file) != content:
                raise DataError(f"{folder / file} is not what was written there")
        token_files.append(files)
    return Made(folder, manifest["details"]["fingerprint"], token_files)


def drop_damaged_orders(folder: Path) -> None:
    """Removes sample orders that Megatron-Core did not finish writing, so that it writes them again."""
    for file in sorted((folder / "index").glob("*.npy")):
        try:
            np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            logger.warning("%s is damaged (%s): it is made again", file, error)
            file.unlink(missing_ok=True)
