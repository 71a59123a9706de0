"""The plan: which elements of a network are kept. Plain data, made from scores or by hand, applied by `slicing`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.files import read_json, write_atomically
from minitron_megatron.model.axes import HIDDEN, Kept
from minitron_megatron.model.layers import PrunableAxis, Sublayer
from minitron_megatron.model.network import Network
from minitron_megatron.pruning.ranges import from_ranges, to_ranges

FILE = "plan.json"

Indices = list[int] | list[list[int]]
"""Kept indices along a prunable axis; for an axis within an outer one, a list for each kept outer element."""


def flat(indices: Indices) -> list[int]:
    """Returns the kept indices of an axis that lies within no other one."""
    return cast("list[int]", indices)  # which it is depends on the axis


def nested(indices: Indices) -> list[list[int]]:
    """Returns the kept indices of an axis that lies within another one."""
    return cast("list[list[int]]", indices)


@dataclass
class Plan:
    """What is kept of a network. All indices are those of the source, in ascending order.

    Attributes:
        source: the network to prune.
        sublayers: positions of the kept sublayers.
        hidden: kept channels of the residual stream.
        elements: kept elements of each sublayer, by its position in the source and the setting of the axis.
        merge: for each kept element of the kind's `merged` axis the dropped one that is merged into it (see `slicing`),
            or itself; by position. Empty if nothing is merged.
        checkpoint: fingerprint of the checkpoint that the plan is for, or None for any checkpoint of the network.
    """

    source: Network
    sublayers: list[int]
    hidden: list[int]
    elements: dict[int, dict[str, Indices]]
    merge: dict[int, list[list[int]]] = field(default_factory=dict)
    checkpoint: str | None = None

    @property
    def target(self) -> Network:
        """The pruned network.

        Raises:
            ConfigError: the elements of an outer axis keep different numbers of inner elements.
        """
        left, problems = [], []
        for position in self.sublayers:
            sublayer, lengths = self.source.sublayers[position], {}
            for axis in sublayer.prunable:
                kept = self.elements[position][axis.setting]
                counts = {len(within) for within in nested(kept)} if axis.axis.within else {len(kept)}
                if len(counts) > 1:
                    problems.append(
                        f"the plan keeps {' or '.join(map(str, sorted(counts)))} {axis.elements}s of "
                        f"{self.source.describe(position)}, depending on the {_outer(sublayer, axis).elements}: each "
                        f"must keep the same number"
                    )
                lengths[axis.axis.name] = max(counts)
            left.append(sublayer.resized(lengths))
        raise_if_any(problems)
        return self.source.replace(sublayers=tuple(left), hidden_size=len(self.hidden))

    def kept(self, position: int | None) -> Kept:
        """Returns kept indices along every axis, for parameters of a sublayer of the source, or of none."""
        kept = {HIDDEN.name: np.array(self.hidden)}
        if position is not None:
            for axis in self.source.sublayers[position].prunable:
                kept[axis.axis.name] = np.array(self.elements[position][axis.setting])
        return kept

    def then(self, second: "Plan") -> "Plan":
        """Composes this plan with a `second` one for its result."""
        if self.merge or second.merge:
            raise ValueError("plans that merge heads change weights: apply them one after the other")
        assert second.source == self.target
        elements: dict[int, dict[str, Indices]] = {}
        for position in second.sublayers:
            origin = self.sublayers[position]
            sublayer, first, then = self.source.sublayers[origin], self.elements[origin], second.elements[position]
            elements[origin] = {}
            for axis in sublayer.prunable:
                before, after = first[axis.setting], then[axis.setting]
                if axis.axis.within:
                    outer = flat(then[_outer(sublayer, axis).setting])
                    pairs = zip(outer, nested(after), strict=True)
                    elements[origin][axis.setting] = [_pick(nested(before)[element], kept) for element, kept in pairs]
                else:
                    elements[origin][axis.setting] = _pick(flat(before), flat(after))
        sublayers = [self.sublayers[position] for position in second.sublayers]
        return Plan(self.source, sublayers, _pick(self.hidden, second.hidden), elements, checkpoint=self.checkpoint)

    def problems(self) -> list[str]:
        """Returns what is wrong with the indices, one sentence each."""
        problems = _index_problems("sublayers", self.sublayers, len(self.source.sublayers))
        problems += _index_problems(HIDDEN.name, self.hidden, self.source.hidden_size)
        if problems:
            return problems
        for position in self.sublayers:
            sublayer, where = self.source.sublayers[position], f"sublayer {position}"
            own = self.elements.get(position, {})
            for axis in sublayer.prunable:
                size, kept = sublayer.sizes[axis.axis.name], own.get(axis.setting, [])
                if not axis.axis.within:
                    problems += _index_problems(f"{where}: {axis.setting}", flat(kept), size)
                    continue
                outer = _outer(sublayer, axis)
                elements = own.get(outer.setting, [])
                if len(elements) != len(kept):
                    problems.append(
                        f"{where}: {axis.setting} has {len(kept)} lists for {len(elements)} kept {outer.setting}: give "
                        f"one for each"
                    )
                for element, within in zip(flat(elements), nested(kept), strict=False):
                    what = f"{where}: {axis.setting} of {outer.elements} {element}"
                    problems += _index_problems(what, within, size)
            problems += self._merge_problems(position)
        return problems

    def _merge_problems(self, position: int) -> list[str]:
        sublayer = self.source.sublayers[position]
        if not self.merge or sublayer.merged is None:
            return []
        kept, partners = nested(self.elements[position][sublayer.merged]), self.merge.get(position, [])
        size = sublayer.sizes[sublayer.axis(sublayer.merged).axis.name]
        named = {element for own in partners for element in own}
        if [len(own) for own in partners] == [len(own) for own in kept] and named <= set(range(size)):
            return []
        element = sublayer.axis(sublayer.merged).elements
        return [f"sublayer {position}: merge must name one of {size} {element}s for each {element} that stays"]

    # Serialisation

    def write(self, folder: Path) -> None:
        """Writes `plan.json` into `folder`."""
        self.write_file(folder / FILE)

    def write_file(self, path: Path) -> None:
        """Writes the plan to a file of any name."""
        write_atomically(path, self.text)

    @property
    def text(self) -> str:
        """The plan as JSON for people to read and edit: a line per sublayer, indices as ranges.

        Removing its line drops a sublayer.
        """
        lines = [
            f'"checkpoint": {json.dumps(self.checkpoint)}',
            f'"source": {json.dumps(self.source.to_dict())}',
            f'"hidden": {json.dumps(to_ranges(self.hidden))}',
            '"sublayers": [\n  ' + ",\n  ".join(map(json.dumps, self._rows())) + "\n]",
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def _rows(self) -> Iterator[dict[str, Any]]:
        for position in self.sublayers:
            sublayer = self.source.sublayers[position]
            row: dict[str, Any] = {
                "position": position,
                "kind": sublayer.symbol,
                "layer": self.source.layer_of(position),
            }
            for axis in sublayer.prunable:
                kept = self.elements[position][axis.setting]
                if axis.axis.within:
                    row[axis.setting] = [to_ranges(own) for own in nested(kept)]
                else:
                    row[axis.setting] = to_ranges(flat(kept))
            yield row | ({"merge": self.merge[position]} if position in self.merge else {})

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Reads a plan: a file, or `plan.json` in a folder.

        Raises:
            CheckpointError: there is no plan, or it cannot be parsed.
            ConfigError: its indices are invalid.
        """
        path = path / FILE if path.is_dir() else path
        values = read_json(path, "a plan")
        try:
            source = Network.from_dict(values["source"])
            hidden = from_ranges(values["hidden"], source.hidden_size, HIDDEN.name)
            plan = cls(source, [], hidden, {}, {}, values["checkpoint"])
            for row in values["sublayers"]:
                plan._add_row(row)
            if not isinstance(plan.checkpoint, str | None):
                raise ValueError(f"checkpoint = {plan.checkpoint!r} must be text or null")
        except KeyError as e:
            raise CheckpointError(f"{path} is not a plan: it has no {e}") from e
        except (ValueError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{path} is not a plan: {e}") from e
        raise_if_any([f"{path}: {problem}" for problem in plan.problems()])
        return plan

    def _add_row(self, row: dict[str, Any]) -> None:
        """Adds a line of the file. Fields that say the same in two ways must agree."""
        position = row["position"]
        where = f"sublayer {position}"
        if type(position) is not int or not 0 <= position < len(self.source.sublayers):
            raise ValueError(f"position = {position!r} must be 0 to {len(self.source.sublayers) - 1}")
        sublayer, layer = self.source.sublayers[position], self.source.layer_of(position)
        # Earlier versions counted among the sublayers of the kind.
        if row.get("kind", sublayer.symbol) != sublayer.symbol or row.get("layer", layer) not in (
            layer,
            self.source.number(position),
        ):
            raise ValueError(
                f"{where}: kind and layer must be {sublayer.symbol!r} and {layer}, which stand at that position"
            )
        self.sublayers.append(position)
        self.elements[position] = {}
        for axis in sublayer.prunable:
            size, given = sublayer.sizes[axis.axis.name], row[axis.setting]
            if not axis.axis.within:
                self.elements[position][axis.setting] = from_ranges(given, size, f"{where}: {axis.setting}")
                continue
            # `problems` checks that there are as many lists as outer elements.
            outer = _outer(sublayer, axis)
            elements = self.elements[position][outer.setting]
            names = [f"{where}: {axis.setting} of {outer.elements} {element}" for element in elements]
            names += [f"{where}: {axis.setting}"] * len(given)
            within = [from_ranges(one, size, name) for one, name in zip(given, names)]
            self.elements[position][axis.setting] = within
        if "merge" in row:
            self.merge[position] = [list(partners) for partners in row["merge"]]
            if any(type(element) is not int for partners in self.merge[position] for element in partners):
                raise ValueError(f"{where}: merge must be lists of whole numbers")


def _outer(sublayer: Sublayer, axis: PrunableAxis) -> PrunableAxis:
    outer = sublayer.outer(axis)
    assert outer is not None
    return outer


def _pick(values: list[int], indices: list[int]) -> list[int]:
    return [values[i] for i in indices]


def _index_problems(what: str, indices: list[int], size: int) -> list[str]:
    if not indices:
        return [f"{what} keeps nothing: keep at least one"]
    problems = []
    if not 0 <= min(indices) <= max(indices) < size:
        problems.append(f"{what} names {min(indices)} to {max(indices)}, and there are 0 to {size - 1}")
    if any(a >= b for a, b in pairwise(indices)):
        problems.append(f"{what} does not ascend, or names something twice: sort it and name each once")
    return problems
