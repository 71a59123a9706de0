"""Records what a run was made with: revision, host, versions."""

import platform
import socket
from importlib.metadata import PackageNotFoundError, version

import torch

import minitron_megatron
from minitron_megatron.launch.version import revision

# Distribution names; packages that are not installed are skipped.
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex")


def provenance() -> dict:
    """Returns `git_revision` of the package's checkout (None for an installed copy), `host`, and `versions` by name."""
    versions = {"minitron-megatron": minitron_megatron.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {"git_revision": revision(), "host": socket.gethostname(), "versions": versions}
