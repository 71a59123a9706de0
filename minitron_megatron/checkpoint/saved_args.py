"""The `args` of a Megatron-LM run, as it saves them in its checkpoints beside the tensors."""

import argparse
import io
import logging
import pickle
import signal
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from minitron_megatron.checkpoint.dcp_chunks import StoredObject
from minitron_megatron.checkpoint.safe_load import check_archive, load_plain
from minitron_megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

_COMMON = "common_state/shard_0_1"
"""Where Megatron-Core keeps what is no tensor since it writes no `common.pt` any more."""

_ENUMS = ("megatron.core.enums", "megatron.core.transformer.enums", "megatron.core.rerun_state_machine")
"""Modules of the choices that are among Megatron's args. Any other class in a checkpoint is not even imported."""


class _LeftOut:
    """Stands where a checkpoint names a class that is not loaded, and forgets what it would have been made of."""

    def __new__(cls, *args: object) -> "_LeftOut":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_args(folder: Path, objects: Mapping[str, StoredObject]) -> argparse.Namespace | None:
    """The args of one iteration's checkpoint, if it has any. Nothing in it is run.

    An arg that holds more than plain values, or a choice that this release of Megatron-Core does not have, is left
    out, which a warning says. Where the rest cannot be read without it, there are no args.

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
    unknown: list[str] = []
    try:
        check_archive(io.BytesIO(common))
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(common))
        plain = {name: kind for name in names if (kind := _plain_class(name))}
        unknown = sorted(set(names) - set(plain))
        classes = plain | {name: type(name, (_LeftOut,), {}) for name in unknown}
        with torch.serialization.safe_globals([(kind, name) for name, kind in classes.items()]):
            values: Any = load_plain(io.BytesIO(common))
        # An object of the index is a list of one.
        args = (values[0] if isinstance(values, list) else values).get("args")
    except Exception as e:  # as many kinds as there are ways to be damaged
        if unknown and isinstance(e, pickle.UnpicklingError):
            logger.warning(
                "%s holds %s: that cannot be loaded safely, so Megatron's args are left out", where, ", ".join(unknown)
            )
            return None
        raise CheckpointError(f"{where} is damaged: {e}") from e
    if not isinstance(args, argparse.Namespace | None):
        raise CheckpointError(f"{where} is damaged: its args are a {type(args).__name__}")
    return args and _without_left_out(args, where)


def _without_left_out(args: argparse.Namespace, where: Path) -> argparse.Namespace:
    left_out = {name: kinds for name, value in vars(args).items() if (kinds := _left_out(value))}
    for name, kinds in left_out.items():
        logger.warning("%s: of Megatron's args, %s is left out: it holds %s", where, name, ", ".join(sorted(kinds)))
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in left_out})


def _left_out(value: Any) -> set[str]:
    """The names of the classes in a value, at any depth, that were not loaded."""
    if isinstance(value, _LeftOut):
        return {type(value).__name__}
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return set().union(*map(_left_out, parts))


def _plain_class(name: str) -> type | None:
    """A class of which a checkpoint may hold values, by its whole name."""
    if name in ("argparse.Namespace", "signal.Signals"):
        return {"argparse.Namespace": argparse.Namespace, "signal.Signals": signal.Signals}[name]
    module, _, attribute = name.rpartition(".")
    if module not in _ENUMS:
        return None
    value = getattr(import_module(module), attribute, None)
    return value if isinstance(value, type) and issubclass(value, Enum) else None
