"""Plugins: Python modules that register kinds of layers, families or axes, and are imported before anything else."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from minitron_megatron.config.fields import SAME_RESULT

ENTRY_POINTS = "minitron_megatron.plugins"
"""Entry-point group under which installed packages declare plugins."""


@dataclass(kw_only=True)
class PluginConfig:
    """Base of the settings of verbs that build or read a network.

    Attributes:
        plugins: Python modules to import first, as in [my_layers], so that settings can use what they register.
            Installed packages with an entry point in the group `minitron_megatron.plugins` are always imported.
    """

    plugins: list[str] = field(default_factory=list, metadata=SAME_RESULT)  # other settings use what they add


def load_plugins(names: list[str]) -> list[str]:
    """Imports the plugins of installed packages, and those that the settings name.

    Returns:
        a sentence for each that cannot be imported.
    """
    installed = [
        _import(f"the installed plugin {point.name} = {point.value}", point.load)
        for point in entry_points(group=ENTRY_POINTS)
    ]
    named = [_import(f"plugins has {name!r}, which", partial(import_module, name)) for name in names]
    return [problem for problem in [*installed, *named] if problem]


def _import(what: str, load: Callable[[], Any]) -> str | None:
    try:
        load()
    except Exception as error:  # whatever somebody else's module does
        if isinstance(error, ModuleNotFoundError):
            return f"{what} cannot be imported: {error}. Install it, or put its folder on PYTHONPATH, for every process"
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if "importlib" in last.filename else f" ({last.filename}, line {last.lineno})"
        return f"{what} cannot be imported: {type(error).__name__}: {error}{place}. Fix the module, or leave it out"
    return None
