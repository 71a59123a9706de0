"""What the fields of a settings class say about themselves, beside type, default and docstring: their metadata."""

import dataclasses
from types import MappingProxyType

SAME_RESULT = MappingProxyType({"changes_result": False})
"""Of a setting that says where or how a result is made, and not what it is: a folder, a layout, how many processes.

Of a section it holds for all of its settings.
"""


def changes_result(field: dataclasses.Field) -> bool:
    """Whether a verb's result depends on a setting. It does unless the setting says otherwise."""
    return field.metadata.get("changes_result", True)
