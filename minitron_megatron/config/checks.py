"""What the checks of settings share."""


def at_least(where: str, name: str, value: float | None, least: float) -> list[str]:
    """The problem, if any, of a number that is below the least that makes sense."""
    if value is None or value >= least:
        return []
    return [f"{where}{name} = {value}: must be at least {least}"]


def nearest_multiples(value: int, of: int) -> str:
    """The multiples of a number below and above a value, for messages."""
    below = value // of * of
    return f"{below} or {below + of}" if below else str(of)
