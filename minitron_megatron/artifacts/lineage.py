"""The lineage of a result: the tree of its inputs, their inputs, and so on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from minitron_megatron.artifacts.fingerprint import is_of
from minitron_megatron.artifacts.manifest import MANIFEST, Manifest, Parent


class State(str, Enum):
    """What is now at the path of an input that a manifest names."""

    SAME = ""
    CHANGED = "changed since"
    GONE = "not there any more"


@dataclass
class Origin:
    """One input of a result.

    Attributes:
        parent: role, path and fingerprint.
        state: whether it is still there. Only an unchanged input has a manifest and origins.
        manifest: of the input, if it is a result itself.
        origins: its own inputs; empty where the same input is listed a second time.
    """

    parent: Parent
    state: State = State.SAME
    manifest: Manifest | None = None
    origins: list["Origin"] = field(default_factory=list)


def origins_of(manifest: Manifest) -> list[Origin]:
    """Returns the inputs of a result with their own inputs, as far back as they are still in place."""
    seen: set[str] = set()
    return [origin_of(parent, seen) for parent in manifest.parents]


def origin_of(parent: Parent, seen: set[str] | None = None) -> Origin:
    """Returns an input with its own inputs, as far back as they are still in place.

    Args:
        parent: the input.
        seen: fingerprints of inputs whose origins are listed already and are not listed again; extended.
    """
    seen = set() if seen is None else seen
    path = Path(parent.path)
    if not path.exists():
        return Origin(parent, State.GONE)
    if not is_of(parent.fingerprint, path):
        return Origin(parent, State.CHANGED)
    manifest = Manifest.read(path) if (path / MANIFEST).is_file() else None
    if manifest is None or parent.fingerprint in seen:
        return Origin(parent, manifest=manifest)
    seen.add(parent.fingerprint)
    return Origin(parent, manifest=manifest, origins=[origin_of(earlier, seen) for earlier in manifest.parents])


def in_creation_order(origins: list[Origin]) -> Iterator[Origin]:
    """Yields all origins in the tree in the order in which they were made, each once."""
    seen: set[str] = set()
    for origin in _depth_first(origins):
        if origin.parent.fingerprint not in seen:
            seen.add(origin.parent.fingerprint)
            yield origin


def _depth_first(origins: list[Origin]) -> Iterator[Origin]:
    for origin in origins:
        yield from _depth_first(origin.origins)
        yield origin
