"""Ascending indices as text: `0-5,8,10-12`."""

import re


def to_ranges(indices: list[int]) -> str:
    """Formats ascending numbers as text: `0-5,8,10-12`."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_ranges(text: str, size: int, what: str = "indices") -> list[int]:
    """Parses the text of `to_ranges`.

    Args:
        text: numbers and ranges of numbers.
        size: upper bound of the numbers, exclusive.
        what: name of the indices, for the error.

    Raises:
        ValueError: the text is malformed, or an index is out of range or repeated.
    """
    parts = re.sub(r"\s", "", text).split(",") if isinstance(text, str) else []
    runs = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in parts if part]
    bounds = [(int(run[1]), int(run[2] or run[1])) for run in runs if run]
    if parts and all(runs) and all(first <= last for first, last in bounds):
        if bounds and max(last for _, last in bounds) >= size:
            raise ValueError(
                f"{what} names {min(first for first, _ in bounds)} to {max(last for _, last in bounds)}, and there "
                f"are 0 to {size - 1}"
            )
        if sum(last - first + 1 for first, last in bounds) > size:
            raise ValueError(f"{what} names something twice: name each once")
        return [i for first, last in bounds for i in range(first, last + 1)]
    raise ValueError(f"{what} = {text!r} must be text of numbers and ascending ranges, as in '0-5,8,10-12'")
