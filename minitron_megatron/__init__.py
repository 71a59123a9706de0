"""Prunes and distills large language models held as Megatron-Core checkpoints.

Each verb of the command line is a function here too. It takes the verb's settings from
`minitron_megatron.config.schema`. For a model in somebody's own Megatron job there are `shape_of`, `current_groups`,
`score_model`, `make_plan` and `draw`, with `Scores` and `Plan` as what the first two give. All is
imported when it is first asked for.
"""

from importlib import import_module

__version__ = "0.1.0"

_FUNCTIONS = {
    "import_checkpoint": "minitron_megatron.checkpoint.convert",
    "export": "minitron_megatron.checkpoint.convert",
    "score": "minitron_megatron.pruning.score",
    "score_model": "minitron_megatron.pruning.calibration",
    "Scores": "minitron_megatron.pruning.scores",
    "make_plan": "minitron_megatron.pruning.plan",
    "Plan": "minitron_megatron.pruning.plan",
    "Pruned": "minitron_megatron.pruning.slicing",
    "shape_of": "minitron_megatron.model.build",
    "current_groups": "minitron_megatron.parallel.groups",
    "prune": "minitron_megatron.pruning.prune",
    "draw": "minitron_megatron.report.gallery",
    "distill": "minitron_megatron.training.distill",
    "evaluate": "minitron_megatron.evaluation.evaluate",
    "compress": "minitron_megatron.recipe",
}

__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str):
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FUNCTIONS[name]), name)
