"""Settings that are text stay the text that was written, where YAML and Hydra would read a number or a special form.

A folder may be called 2024_11_29, 1.10 or 1e5, an account 0123, and a time limit is 12:00:00.
"""

import re
from typing import Any, get_args

from omegaconf import DictConfig

from minitron_megatron.config.fields import hints, is_section, named_section
from minitron_megatron.config.schema import SCHEMAS

_OVERRIDE = re.compile(r"(?P<key>[+~]{0,2}[^=]+)=(?P<value>.*)", re.DOTALL)
_QUOTED = re.compile(r"""\s*(".*"|'.*')\s*""", re.DOTALL)
# Top level of a list: quoted text, or anything up to the next comma.
_ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,]*?)\s*(?:,|$)""")


def as_value(text: str) -> str:
    """Quotes any text as the value of an override."""
    # In Hydra a backslash is special only before a quote.
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), text)
    return f'"{escaped}"'


def quote_text(verb: str, override: str) -> str:
    """Quotes the value of an override whose setting is text: what was written is meant, whatever it looks like.

    What is quoted already, null and ??? are left as they are, and so is a list in a list.
    """
    match = _OVERRIDE.fullmatch(override)
    if not match or ("," in match["value"] and _kind(verb, match["key"].lstrip("+~")) is str):
        return override  # for a sweep, text with a comma has to be quoted
    kind, value = _kind(verb, match["key"].lstrip("+~")), match["value"]
    if kind is str:
        return f"{match['key']}={_quoted(value)}"
    if kind is list and (inner := re.fullmatch(r"\s*\[([^\[\]{}]*)\]\s*", value, re.DOTALL)):
        items = [_quoted(item) for item in _ITEM.findall(inner[1]) if item]
        return f"{match['key']}=[{','.join(items)}]"
    return override


def keep_text(verb: str, node: DictConfig, written: Any, where: str = "") -> None:
    """Gives settings that are text the text of a YAML file, where OmegaConf has read a number or a boolean.

    Args:
        verb: whose settings they are.
        node: what OmegaConf has read; changed.
        written: the same with every value as text.
        where: dotted path of both, with its closing dot.
    """
    for key in list(node) if isinstance(written, dict) else ():
        value: Any = node._get_node(key)
        text = written.get(str(key))
        kind = _kind(verb, f"{where}{key}")
        if isinstance(value, DictConfig) and isinstance(text, dict):
            keep_text(verb, value, text, f"{where}{key}.")
        elif kind is str and isinstance(text, str) and _is_no_text(node, key):
            node[key] = text
        elif kind is list and isinstance(text, list):
            for number, item in enumerate(text):
                if isinstance(item, str) and _is_no_text(value, number):
                    value[number] = item


def _is_no_text(node: Any, key: Any) -> bool:
    value = node._get_node(key)._value()
    return isinstance(value, int | float)


def _quoted(value: str) -> str:
    is_special = _QUOTED.fullmatch(value) or value.strip() in ("null", "???", "")
    return value if is_special else as_value(value)


def _kind(verb: str, key: str) -> type | None:
    """Returns whether a setting is text (`str`), a list of texts (`list`) or something else (None)."""
    names = key.split(".")
    if verb == "compress" and names[0] == "stages":
        # The verb of the stage may stand in another file.
        kinds = {_kind_in(schema, names[2:]) for schema in SCHEMAS.values()} - {Any}
        return kinds.pop() if len(kinds) == 1 else None
    kind = _kind_in(SCHEMAS[verb], names)
    return None if kind is Any else kind


def _kind_in(schema: Any, names: list[str]) -> Any:
    """Returns `_kind` of the setting with this path in a settings class; `Any` if it has none."""
    for name in names:
        if section := named_section(schema):  # `name` is the user's choice
            schema = section
            continue
        if not is_section(schema) or name not in hints(schema):
            return Any
        schema = hints(schema)[name]
    kinds = {schema} if named_section(schema) else {*get_args(schema), schema}
    return str if str in kinds and schema != list[str] else list if list[str] in kinds else None
