"""The manifest: what an output folder is, what it was made from, and whether it is whole.

`manifest.json` is the last file that a stage writes. A folder without it is not a result.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from minitron_megatron import __version__
from minitron_megatron.checkpoint.safe_load import read_json
from minitron_megatron.config.changes import content, defaults, differences
from minitron_megatron.config.reader import show
from minitron_megatron.config.schema import SCHEMAS
from minitron_megatron.data.corpus import text_paths
from minitron_megatron.disk import convert_enospc, require_space
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.parallel.workers import ALONE, Workers
from minitron_megatron.process import handling

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What an evaluation measured, beside its manifest.
EVALUATION = "evaluation.json"
_SAMPLE_BYTES = 64 * 1024


@dataclass
class Parent:
    """One input of a stage.

    Attributes:
        role: what it was to the stage, e.g. `teacher`.
        path: where it lay.
        fingerprint: of its content, see `fingerprint`.
    """

    role: str
    path: str
    fingerprint: str

    @classmethod
    def of(cls, role: str, path: Path) -> "Parent":
        return cls(role, str(path), fingerprint(path))

    @classmethod
    def of_text(cls, text: list[str]) -> list["Parent"]:
        """The files and folders that the documents of `DataConfig.text` come from.

        Raises:
            DataError: one does not exist.
        """
        return [cls.of(f"text {number}", path) for number, path in enumerate(text_paths(text), start=1)]


@dataclass
class Manifest:
    """What a folder is.

    Attributes:
        kind: `checkpoint`, `scores`, `evaluation`, `huggingface` or `run`.
        network: as plain values, where there is one.
        parents: what it was made from.
        config: the settings it was made with, resolved.
        details: what else is worth knowing (counts, seconds, notes).
        version: of this package.
        verb: that made the folder; None in files of versions that did not say.
    """

    kind: str
    network: dict | None = None
    parents: list[Parent] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    version: str = __version__
    verb: str | None = None

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder` in one step."""
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a folder's manifest.

        Raises:
            CheckpointError: there is none, or it cannot be understood.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a finished result")
        values = read_json(path, "a manifest")
        try:
            return cls.from_dict(values)
        except TypeError as e:
            raise CheckpointError(f"{path} is not a manifest: {e}") from e

    @classmethod
    def from_dict(cls, values: dict) -> "Manifest":
        """A manifest from the content of its file.

        Raises:
            TypeError: a field is unknown, or of no value that it may have.
        """
        former = {"network": values["shape"]} if "shape" in values else {}  # as earlier versions called it
        given = {name: value for name, value in values.items() if name != "shape"}
        found = cls(**{**given, **former, "parents": [Parent(**parent) for parent in values.get("parents", [])]})
        kinds = {
            "kind": str,
            "network": dict | None,
            "config": dict,
            "details": dict,
            "version": str,
            "verb": str | None,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(found, name), kind):
                raise TypeError(f"{name} = {show(getattr(found, name))}")
        return found

    @property
    def cache_key(self) -> tuple[str, dict[str, str], dict[str, object]]:
        """What makes the result what it is: kind, fingerprints of the parents by role, and settings.

        The settings are those of which the verb's settings class says that a result depends on them.
        """
        parents = {parent.role: parent.fingerprint for parent in self.parents}
        # A parent is known by its content, so that moving a folder changes nothing.
        settings = {name: value for name, value in self.config.items() if name not in parents}
        return self.kind, parents, content(SCHEMAS.get(self.verb or ""), settings)

    def changes(self, later: "Manifest") -> list[str]:
        """What a later stage does otherwise than this one did, a phrase for each: none if its result is the same."""
        # A manifest without a verb is of an earlier version, and is read as one of the verb that comes upon it.
        before = self if self.verb else replace(self, verb=later.verb)
        (kind, parents, settings), (new_kind, new_parents, new_settings) = before.cache_key, later.cache_key
        kinds = [] if kind == new_kind else [f"it was a {kind} and is to be a {new_kind}"]
        inputs = [f"{role} is another one" for role, _, _ in differences(parents, new_parents)]
        came_later = dict(defaults(SCHEMAS[later.verb])) if later.verb in SCHEMAS else {}
        values = differences({**came_later, **settings}, {**came_later, **new_settings})
        return [*kinds, *inputs, *(f"{key} was {show(old)} and is {show(new)}" for key, old, new in values)]


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step; a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def fingerprint(path: Path) -> str:
    """A hash of a file's or folder's content that is cheap for any size.

    Names, sizes, and the first, middle and last 64 KiB of every file count. Weights that were trained
    further differ everywhere, so the samples tell them apart; it is no protection against forgery.
    """
    digest = hashlib.sha256()
    root = path if path.is_dir() else path.parent
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)}\0{size}\0".encode())
        with open(file, "rb") as f:
            for start in sorted({0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)}):
                f.seek(start)
                digest.update(f.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def conflict_message(output: Path, changes: list[str]) -> str:
    """The problem of an output that holds a result which differs in `changes` from the one that is asked for."""
    return (
        f"output = {output} holds a result of other settings or inputs ({'; '.join(changes)}): go back to those, "
        f"choose another output or remove this one"
    )


def is_done(output: Path, manifest: Manifest) -> bool:
    """Whether `output` already holds what `manifest` describes.

    Raises:
        ConfigError: it holds something else, which is never overwritten.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).exists():
        raise ConfigError([f"output = {output} exists and is not a finished result: choose another or remove it"])
    if changes := Manifest.read(output).changes(manifest):
        raise ConfigError([conflict_message(output, changes)])
    logger.info("%s is there already with the same inputs: skipped", output)
    return True


@contextmanager
def writing(output: Path, manifest: Manifest, num_bytes: int = 0, workers: Workers = ALONE) -> Iterator[Path]:
    """Write a result folder so that it appears whole or not at all.

    Yields a temporary folder beside `output`. When the block ends, the manifest is added and the folder
    renamed to `output`; when it fails, or the process is told to end (SIGTERM), the folder is removed.

    Args:
        output: the folder to make; it must not exist, or be empty.
        manifest: of the result.
        num_bytes: what will be written, to be refused before any work if the disk is too small.
        workers: who write it together. What fails in the block must fail on all of them.

    Raises:
        DiskSpaceError: the disk is or gets full.
    """
    temporary = output.with_name(f".{output.name}.partial")

    def begin() -> None:
        require_space(output.parent, num_bytes)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def finish() -> None:
        # The manifest says that all is there, after a power loss as well.
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
        manifest.write(temporary)
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)

    # By whoever is left, for the first worker may be the one that was ended.
    with _removed_at_the_end(temporary), convert_enospc(output):
        workers.run_on_main(begin)
        yield temporary
        workers.run_on_main(finish)


@contextmanager
def _removed_at_the_end(folder: Path) -> Iterator[None]:
    """Remove `folder` when the block ends. SIGTERM, which launchers send to the ranks that are left, ends it, too."""
    is_ending = False

    def end(number: int, frame: FrameType | None) -> None:
        if not is_ending:
            raise SystemExit(128 + number)

    with handling((signal.SIGTERM,), end):
        try:
            yield
        finally:
            is_ending = True
            shutil.rmtree(folder, ignore_errors=True)
