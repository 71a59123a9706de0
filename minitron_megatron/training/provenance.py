"""What a run was made with: revision, host, versions."""

import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import minitron_megatron

# By the names that their installers give them; those that are not installed are left out.
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex")


def provenance() -> dict:
    """`git_revision` of the package's checkout (None for an installed copy), `host`, and `versions` by name."""
    found = {"minitron-megatron": minitron_megatron.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return {"git_revision": _git_revision(), "host": socket.gethostname(), "versions": found}


def _git_revision() -> str | None:
    """The commit, with `-dirty` behind it where tracked files differ from it."""
    root = Path(minitron_megatron.__file__).resolve().parent.parent
    # Asked for here and not left to git, which would find a repository that an installed copy merely lies in.
    if not (root / ".git").exists():
        return None
    # `--exclude` leaves the commit itself as the only name.
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout that another user owns
        return None
