"""Prunes and distills large language models held as Megatron-Core checkpoints.

Each verb of the command line is a function here too (`import` is `import_checkpoint`). It takes the verb's settings
from `minitron_megatron.config.schema` and checks them. Attributes are imported on first use.

In your own Megatron job use `current_context`, `network_of`, `score_model` (returns `Scores`) and `make_plan` (returns
a `Plan`). `Pruned` applies a plan to any source of weights, and `draw` makes the figures. `DistillationStep` runs a
step of distillation: its entries name the losses (made by `loss_entries` from a `LossConfig`, or your own objectives),
and a `LiveTeacher` gives the targets.
"""

import os
from importlib import import_module
from typing import Any

from minitron_megatron.config.verbs import VERBS, verb_function
from minitron_megatron.process import is_spawned
from minitron_megatron.process_tree import watch_parent

__version__ = "0.1.0"

if is_spawned():  # a helper of multiprocessing, which imports this first and would otherwise outlive a killed parent
    watch_parent(os.getppid())

_VERBS = {place.split(":")[1]: verb for verb, place in VERBS.items()}
_PARTS = {
    "current_context": "minitron_megatron.parallel.context",
    "network_of": "minitron_megatron.model.build",
    "score_model": "minitron_megatron.pruning.score_model",
    "Scores": "minitron_megatron.pruning.scores",
    "make_plan": "minitron_megatron.pruning.make_plan",
    "Plan": "minitron_megatron.pruning.plan",
    "Pruned": "minitron_megatron.pruning.slicing",
    "DistillationStep": "minitron_megatron.distillation.step",
    "LiveTeacher": "minitron_megatron.distillation.live_teacher",
    "Entry": "minitron_megatron.distillation.objectives",
    "loss_entries": "minitron_megatron.distillation.entries",
    "LossConfig": "minitron_megatron.config.loss",
    "draw": "minitron_megatron.report.gallery",
}

__all__ = ["__version__", *_VERBS, *_PARTS]


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return verb_function(_VERBS[name])
    if name in _PARTS:
        return getattr(import_module(_PARTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
