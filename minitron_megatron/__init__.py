"""Prunes and distills large language models held as Megatron-Core checkpoints.

Each verb of the command line is a function here too. It takes the verb's settings from
`minitron_megatron.config.schema`, and is imported when it is first asked for.
"""

from importlib import import_module

__version__ = "0.1.0"

_FUNCTIONS = {
    "import_checkpoint": "minitron_megatron.checkpoint.convert",
    "export": "minitron_megatron.checkpoint.convert",
    "score": "minitron_megatron.pruning.score",
    "prune": "minitron_megatron.pruning.prune",
    "distill": "minitron_megatron.training.distill",
    "evaluate": "minitron_megatron.evaluation.evaluate",
    "compress": "minitron_megatron.recipe",
}

__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str):
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FUNCTIONS[name]), name)
