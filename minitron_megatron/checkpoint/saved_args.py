"""The `args` of a Megatron-LM run, as it saves them in the `common.pt` of its checkpoints."""

import argparse
import logging
import signal
from enum import Enum
from importlib import import_module
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_ENUMS = ("megatron.core.enums", "megatron.core.transformer.enums", "megatron.core.rerun_state_machine")
"""Modules of the choices that are among Megatron's args. Any other class in a checkpoint is not even imported."""


def read_args(path: Path) -> argparse.Namespace | None:
    """The args in a `common.pt`, if it has any. Nothing in it is run.

    Where it holds more than plain values, a warning names that, and it counts as having none.
    """
    if not path.is_file():
        return None
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    plain = {name: found for name in names if (found := _plain_class(name))}
    if unsafe := sorted(set(names) - set(plain)):
        logger.warning(
            "%s holds %s: that cannot be loaded safely, so Megatron's args are left out", path, ", ".join(unsafe)
        )
        return None
    with torch.serialization.safe_globals(list(plain.values())):
        return torch.load(path, map_location="cpu", weights_only=True).get("args")


def _plain_class(name: str) -> type | None:
    """A class of which a checkpoint may hold values, by its whole name."""
    if name in ("argparse.Namespace", "signal.Signals"):
        return {"argparse.Namespace": argparse.Namespace, "signal.Signals": signal.Signals}[name]
    module, _, attribute = name.rpartition(".")
    if module not in _ENUMS:
        return None
    found = getattr(import_module(module), attribute, None)
    return found if isinstance(found, type) and issubclass(found, Enum) else None
