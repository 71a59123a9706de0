"""Helpers for checks of settings."""


def at_least(where: str, name: str, value: float | None, least: float) -> list[str]:
    """Returns a problem if a value is below its minimum."""
    if value is None or value >= least:
        return []
    return [f"{where}{name} = {value}: must be at least {least}"]


def nearest_multiples(value: int, of: int) -> str:
    """Returns the multiples of `of` below and above a value, for messages."""
    below = value // of * of
    return f"{below} or {below + of}" if below else str(of)
