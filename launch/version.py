"""Identifies the code, to check that every node has the one that a run was launched with."""

import functools
import hashlib
import os
import subprocess
from pathlib import Path

import minitron_megatron

_SUFFIXES = (".py", ".yaml", ".j2")


def code_version() -> dict[str, str | None]:
    """Returns version, digest of the package's files and, in a checkout, its revision."""
    return {"version": minitron_megatron.__version__, "digest": digest(), "revision": revision()}


@functools.cache
def digest() -> str:
    """Returns a hash of every file of the installed package that holds code or settings."""
    root = Path(minitron_megatron.__file__).parent
    # conf/ and launch/ are links in a checkout and folders in an installed copy.
    folders = [Path(folder) for folder, _, _ in os.walk(root, followlinks=True)]
    files = [path for folder in folders for path in folder.iterdir() if path.suffix in _SUFFIXES]
    content_hash = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        content_hash.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
    return content_hash.hexdigest()[:16]


def revision() -> str | None:
    """Returns the commit of the package's checkout, marked `-dirty` if it was changed; None outside of a checkout."""
    root = Path(minitron_megatron.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is missing, or refuses a checkout of another user
        return None
