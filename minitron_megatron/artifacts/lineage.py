"""Where a result comes from: the tree of what it was made from, and what that was made from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from minitron_megatron.artifacts.manifest import MANIFEST, Manifest, Parent, fingerprint


class State(str, Enum):
    """What is at the place that a manifest names."""

    SAME = ""
    CHANGED = "changed since"
    GONE = "not there any more"


@dataclass
class Origin:
    """One thing that a result was made from.

    Attributes:
        parent: role, place and fingerprint.
        state: what is there now. Only of what is the same is more known.
        manifest: of a result, if it is one.
        origins: what it was made from; empty where it is listed a second time.
    """

    parent: Parent
    state: State = State.SAME
    manifest: Manifest | None = None
    origins: list["Origin"] = field(default_factory=list)


def origins_of(manifest: Manifest) -> list[Origin]:
    """Finds out what a result was made from, as far back as things are where they were."""
    seen: set[str] = set()
    return [origin_of(parent, seen) for parent in manifest.parents]


def origin_of(parent: Parent, seen: set[str] | None = None) -> Origin:
    """Finds out where something comes from, as far back as things are where they were.

    Args:
        parent: what to begin with.
        seen: fingerprints whose origins are listed already, and are not again; added to.
    """
    seen = set() if seen is None else seen
    path = Path(parent.path)
    if not path.exists():
        return Origin(parent, State.GONE)
    if fingerprint(path) != parent.fingerprint:
        return Origin(parent, State.CHANGED)
    manifest = Manifest.read(path) if (path / MANIFEST).is_file() else None
    if manifest is None or parent.fingerprint in seen:
        return Origin(parent, manifest=manifest)
    seen.add(parent.fingerprint)
    return Origin(parent, manifest=manifest, origins=[origin_of(earlier, seen) for earlier in manifest.parents])


def makers_first(origins: list[Origin]) -> Iterator[Origin]:
    """Yields origins and theirs, each after what it was made from, and each once."""
    seen: set[str] = set()
    for origin in _depth_first(origins):
        if origin.parent.fingerprint not in seen:
            seen.add(origin.parent.fingerprint)
            yield origin


def _depth_first(origins: list[Origin]) -> Iterator[Origin]:
    for origin in origins:
        yield from _depth_first(origin.origins)
        yield origin
