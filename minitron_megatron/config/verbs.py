"""The verbs: where the function of each one lives, and which of them run in several ranks."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

VERBS = {
    "import": "minitron_megatron.checkpoint.convert:import_checkpoint",
    "score": "minitron_megatron.pruning.score:score",
    "prune": "minitron_megatron.pruning.prune:prune",
    "distill": "minitron_megatron.training.distill:distill",
    "evaluate": "minitron_megatron.evaluation.evaluate:evaluate",
    "export": "minitron_megatron.checkpoint.convert:export",
    "inspect": "minitron_megatron.report.inspect:inspect",
    "compress": "minitron_megatron.recipe:compress",
}
"""Module and function by verb. The function takes the verb's settings object."""

DISTRIBUTED = ("score", "distill", "evaluate")
"""Verbs whose `parallel` says how many ranks run them."""

SHARED = ("import", "prune")
"""Verbs whose work any number of ranks can share; `workers` says how many when there are none."""


def verb_function(verb: str) -> Callable[[Any], Any]:
    """The function of a verb, imported when it is needed."""
    module, function = VERBS[verb].split(":")
    return getattr(import_module(module), function)
