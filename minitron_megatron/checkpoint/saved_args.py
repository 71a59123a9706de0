"""The `args` of a Megatron-LM run, as it saves them in its checkpoints beside the tensors."""

import argparse
import io
import logging
import signal
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from pathlib import Path

import torch

from minitron_megatron.checkpoint.chunks import StoredObject
from minitron_megatron.checkpoint.plain import check_archive, load_plain
from minitron_megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

_COMMON = "common_state/shard_0_1"
"""Where Megatron-Core keeps what is no tensor since it writes no `common.pt` any more."""

_ENUMS = ("megatron.core.enums", "megatron.core.transformer.enums", "megatron.core.rerun_state_machine")
"""Modules of the choices that are among Megatron's args. Any other class in a checkpoint is not even imported."""


def read_args(folder: Path, objects: Mapping[str, StoredObject]) -> argparse.Namespace | None:
    """The args of one iteration's checkpoint, if it has any. Nothing in it is run.

    Where what they are saved with holds more than plain values, a warning names that, and it counts as having none.

    Args:
        folder: of the iteration.
        objects: that the checkpoint's index names.

    Raises:
        CheckpointError: it is damaged.
    """
    if (folder / "common.pt").is_file():
        where, common = folder / "common.pt", (folder / "common.pt").read_bytes()
    elif stored := objects.get(_COMMON):
        where, common = stored.path, stored.read()
    else:
        return None
    try:
        check_archive(io.BytesIO(common))
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(common))
        plain = {name: found for name in names if (found := _plain_class(name))}
        if unsafe := sorted(set(names) - set(plain)):
            logger.warning(
                "%s holds %s: that cannot be loaded safely, so Megatron's args are left out", where, ", ".join(unsafe)
            )
            return None
        with torch.serialization.safe_globals(list(plain.values())):
            found = load_plain(io.BytesIO(common))
        # An object of the index is a list of one.
        args = (found[0] if isinstance(found, list) else found).get("args")
    except Exception as e:  # as many kinds as there are ways to be damaged
        raise CheckpointError(f"{where} is damaged: {e}") from e
    if not isinstance(args, argparse.Namespace | None):
        raise CheckpointError(f"{where} is damaged: its args are a {type(args).__name__}")
    return args


def _plain_class(name: str) -> type | None:
    """A class of which a checkpoint may hold values, by its whole name."""
    if name in ("argparse.Namespace", "signal.Signals"):
        return {"argparse.Namespace": argparse.Namespace, "signal.Signals": signal.Signals}[name]
    module, _, attribute = name.rpartition(".")
    if module not in _ENUMS:
        return None
    found = getattr(import_module(module), attribute, None)
    return found if isinstance(found, type) and issubclass(found, Enum) else None
