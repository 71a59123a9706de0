"""The verbs: the function of each, and which of them run on several ranks."""

import dataclasses
import functools
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from minitron_megatron.config.plugins import load_plugins
from minitron_megatron.config.reader import MISSING
from minitron_megatron.disk import convert_os_errors
from minitron_megatron.errors import raise_if_any
from minitron_megatron.process import import_heavy, main_script_problems

VERBS = {
    "import": "minitron_megatron.checkpoint.convert:import_checkpoint",
    "score": "minitron_megatron.pruning.score:score",
    "prune": "minitron_megatron.pruning.prune:prune",
    "sparsify": "minitron_megatron.sparsity.sparsify:sparsify",
    "quantize": "minitron_megatron.sparsity.quantize:quantize",
    "cache": "minitron_megatron.training.cache:cache",
    "distill": "minitron_megatron.training.distill:distill",
    "evaluate": "minitron_megatron.evaluation.evaluate:evaluate",
    "export": "minitron_megatron.checkpoint.convert:export",
    "compare": "minitron_megatron.report.compare:compare",
    "inspect": "minitron_megatron.report.inspect:inspect",
    "compress": "minitron_megatron.recipe:compress",
}
"""Module and function by verb. The function takes the verb's settings object."""

DISTRIBUTED = ("score", "sparsify", "quantize", "cache", "distill", "evaluate")
"""Verbs that run on as many ranks as `parallel` says."""

LIGHT = ("compress",)
"""Verbs that leave the work to others, and load no torch."""

SHARED = ("import", "prune", "export")
"""Verbs whose work any number of ranks can share; without a launcher `workers` says how many."""


def verb_function(verb: str) -> Callable[[Any], Any]:
    """Imports the function of a verb, and wraps it in a check of its settings.

    The function raises:
        ConfigError: a setting is missing or wrong. Checks that read no file come before any work. Or the main script
            cannot be imported by the processes that the verb starts.
        DiskSpaceError: a disk is full.
    """
    module, name = VERBS[verb].split(":")
    function = getattr((import_module if verb in LIGHT else import_heavy)(module), name)

    @functools.wraps(function)
    def checked(config: Any) -> Any:
        raise_if_any(main_script_problems(name, starts_processes=verb in ("distill", "compress")))
        with convert_os_errors(*_folders(config)):
            raise_if_any(load_plugins(getattr(config, "plugins", [])))
            raise_if_any([*_missing(config), *config.problems()])
            return function(config)

    return checked


def _folders(config: Any) -> list[Path]:
    """Returns the folders that a verb may write to, the one of its result first."""
    names = [getattr(config, name, None) for name in ("output", "run_dir", "figures")]
    names.append(getattr(getattr(config, "data", None), "cache_dir", None))
    return [Path(name) for name in names if name and name != MISSING]


def _missing(config: Any) -> list[str]:
    fields = [field.name for field in dataclasses.fields(config) if field.default == MISSING]
    return [f"{name} is missing: give {name}=VALUE" for name in fields if getattr(config, name) in (MISSING, "")]
