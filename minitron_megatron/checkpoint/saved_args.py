"""Reads the `args` of a Megatron-LM run from its checkpoints."""

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
"""Key of the common state in releases of Megatron-Core that write no `common.pt`."""

_ENUMS = ("megatron.core.enums", "megatron.core.transformer.enums", "megatron.core.rerun_state_machine")
"""Modules of the enums among Megatron's args. No other class in a checkpoint is even imported."""


class _LeftOut:
    """Replaces an object of a class that is not loaded, and discards its state."""

    def __new__(cls, *args: object) -> "_LeftOut":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_args(folder: Path, objects: Mapping[str, StoredObject]) -> argparse.Namespace | None:
    """Reads the args of one iteration, if it has any, without running any code in them.

    An arg that holds more than plain values, or an enum that this release of Megatron-Core does not have, is left out
    with a warning. If the rest cannot be read without it, there are no args.

    Args:
        folder: of the iteration.
        objects: the objects in the checkpoint's index.

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
        # Objects in the index are lists of one.
        args = (values[0] if isinstance(values, list) else values).get("args")
    except Exception as e:  # damaged files raise exceptions of many types
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
    """Returns the names of the classes in a value, at any depth, that were not loaded."""
    if isinstance(value, _LeftOut):
        return {type(value).__name__}
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return set().union(*map(_left_out, parts))


def _plain_class(name: str) -> type | None:
    """Returns a class that a checkpoint may hold objects of, by its full name; None for any other."""
    if name in ("argparse.Namespace", "signal.Signals"):
        return {"argparse.Namespace": argparse.Namespace, "signal.Signals": signal.Signals}[name]
    module, _, attribute = name.rpartition(".")
    if module not in _ENUMS:
        return None
    value = getattr(import_module(module), attribute, None)
    return value if isinstance(value, type) and issubclass(value, Enum) else None
