"""Prunes and distills large language models held as Megatron-Core checkpoints.

Each verb of the command line is a function here too (`import` is `import_checkpoint`). It takes the verb's settings
from `minitron_megatron.config.schema`, checks them, and is imported when it is first asked for.
"""

from minitron_megatron.config.verbs import VERBS, verb_function

__version__ = "0.1.0"

_FUNCTIONS = {place.split(":")[1]: verb for verb, place in VERBS.items()}

__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str):
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return verb_function(_FUNCTIONS[name])
