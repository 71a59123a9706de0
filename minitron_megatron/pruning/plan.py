"""The plan: which elements of a network stay. Plain data, made from scores or by hand, applied by `slicing`."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import Tensor

from minitron_megatron.checkpoint.manifest import write_atomically
from minitron_megatron.checkpoint.plain import read_json
from minitron_megatron.config.schema import (
    DepthCriterion,
    DepthSearch,
    ParallelConfig,
    TargetConfig,
    Unit,
)
from minitron_megatron.errors import CheckpointError, ConfigError, raise_if_any
from minitron_megatron.model.axes import Kept
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.pruning.scores import DepthSettings, Scores, descending, group_scores
from minitron_megatron.pruning.target import Target, resolve_target

FILE = "plan.json"


@dataclass
class Plan:
    """What stays of a network. All indices count in the source and ascend.

    Attributes:
        source: shape of the network that is cut.
        sublayers: kept positions of the source's pattern.
        hidden: kept channels of the residual stream.
        ffn: kept neurons, by position of the MLP sublayer.
        group: kept query groups, by position of the attention sublayer.
        head: kept heads of each kept group `[group, head]`, by position of the attention sublayer.
        merge: for each kept head the head whose queries it takes a share of (see `slicing`), or the head itself;
            by position like `head`. Empty if no heads are merged.
        checkpoint: fingerprint of the checkpoint that the plan is for, or None for any of that shape.
    """

    source: ModelShape
    sublayers: list[int]
    hidden: list[int]
    ffn: dict[int, list[int]]
    group: dict[int, list[int]]
    head: dict[int, list[list[int]]]
    merge: dict[int, list[list[int]]] = field(default_factory=dict)
    checkpoint: str | None = None

    @property
    def target(self) -> ModelShape:
        """Shape of what is left.

        Raises:
            ConfigError: layers would differ in size, which no model class realises.
        """
        sizes = {
            "neurons": {len(kept) for kept in self.ffn.values()},
            "query groups": {len(kept) for kept in self.group.values()},
            "heads per query group": {len(heads) for kept in self.head.values() for heads in kept},
        }
        raise_if_any(
            [
                f"the plan keeps {' or '.join(map(str, sorted(found)))} {name}, depending on the layer: "
                f"every layer must keep the same number"
                for name, found in sizes.items()
                if len(found) > 1
            ]
        )
        ffn, groups, heads = (next(iter(found), None) for found in sizes.values())
        return self.source.replace(
            pattern="".join(self.source.pattern[p] for p in self.sublayers),
            hidden=len(self.hidden),
            ffn=ffn or self.source.ffn,
            num_query_groups=groups or self.source.num_query_groups,
            num_heads=groups * heads if groups else self.source.num_heads,
        )

    def source_layer(self, sublayer: str, layer: int) -> int:
        """Where sublayer number `layer` of a kind, in the target, lies among those of the source."""
        return self.source.sublayers(sublayer).index(self.position(sublayer, layer))

    def position(self, sublayer: str, layer: int) -> int:
        """Position in the source's pattern of sublayer number `layer` of a kind, in the target."""
        return [p for p in self.sublayers if self.source.pattern[p] == sublayer][layer]

    def kept(self, sublayer: str | None, layer: int | None) -> Kept:
        """Kept indices along every axis, for the parameters of one sublayer of the target."""
        kept = {"hidden": np.array(self.hidden)}
        if sublayer == MLP:
            kept["ffn"] = np.array(self.ffn[self.position(sublayer, layer)])
        if sublayer == ATTENTION:
            position = self.position(sublayer, layer)
            kept["group"] = np.array(self.group[position])
            kept["head"] = np.array(self.head[position])
        return kept

    def then(self, second: "Plan") -> "Plan":
        """One plan that does what this one and then `second`, which is for its result, do one after the other."""
        if self.merge or second.merge:
            raise ValueError("plans that merge heads change weights: apply them one after the other")
        assert second.source == self.target
        plan = Plan(self.source, [], _pick(self.hidden, second.hidden), {}, {}, {}, checkpoint=self.checkpoint)
        for position in second.sublayers:
            origin = self.sublayers[position]
            plan.sublayers.append(origin)
            if position in second.ffn:
                plan.ffn[origin] = _pick(self.ffn[origin], second.ffn[position])
            else:
                groups = second.group[position]
                plan.group[origin] = _pick(self.group[origin], groups)
                plan.head[origin] = [
                    _pick(self.head[origin][group], heads)
                    for group, heads in zip(groups, second.head[position], strict=True)
                ]
        return plan

    def problems(self) -> list[str]:
        """What is wrong with the indices, one sentence each."""
        source, found = self.source, []
        found += _index_problems("sublayers", self.sublayers, len(source.pattern))
        found += _index_problems("hidden", self.hidden, source.hidden)
        if found:
            return found
        for position in self.sublayers:
            where = f"sublayer {position}"
            if source.pattern[position] == MLP:
                found += _index_problems(f"{where}: ffn", self.ffn.get(position, []), source.ffn)
                continue
            groups, heads = self.group.get(position, []), self.head.get(position, [])
            found += _index_problems(f"{where}: groups", groups, source.num_query_groups)
            if len(groups) != len(heads):
                found.append(f"{where}: heads has {len(heads)} lists for {len(groups)} kept groups: give one for each")
            for group, kept in zip(groups, heads, strict=False):
                found += _index_problems(f"{where}: heads of group {group}", kept, source.heads_per_group)
            partners = self.merge.get(position, [])
            if self.merge and (
                [len(own) for own in partners] != [len(kept) for kept in heads]
                or not {head for own in partners for head in own} <= set(range(source.heads_per_group))
            ):
                found.append(f"{where}: merge must name one of {source.heads_per_group} heads for each head that stays")
        return found

    def write(self, folder: Path) -> None:
        """Write `plan.json` into `folder`."""
        self.write_file(folder / FILE)

    def write_file(self, path: Path) -> None:
        """Write the plan to a file of any name."""
        write_atomically(path, self.text)

    @property
    def text(self) -> str:
        """The plan as JSON that can be read and edited: a line per sublayer, indices as ranges.

        To drop a sublayer is to remove its line.
        """
        lines = [
            f'"checkpoint": {json.dumps(self.checkpoint)}',
            f'"source": {json.dumps(self.source.to_dict())}',
            f'"hidden": {json.dumps(to_ranges(self.hidden))}',
            '"sublayers": [\n  ' + ",\n  ".join(map(json.dumps, self._rows())) + "\n]",
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def _rows(self) -> Iterator[dict]:
        for position in self.sublayers:
            kind = self.source.pattern[position]
            row = {"position": position, "kind": kind, "layer": self.source.sublayers(kind).index(position)}
            if kind == MLP:
                yield row | {"ffn": to_ranges(self.ffn[position])}
                continue
            row |= {"groups": to_ranges(self.group[position]), "heads": [to_ranges(h) for h in self.head[position]]}
            yield row | ({"merge": self.merge[position]} if self.merge else {})

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan: a file, or `plan.json` in a folder.

        Raises:
            CheckpointError: there is none, or it cannot be understood.
            ConfigError: its indices are not possible.
        """
        path = path / FILE if path.is_dir() else path
        values = read_json(path, "a plan")
        try:
            source = ModelShape.from_dict(values["source"])
            hidden = from_ranges(values["hidden"], source.hidden, "hidden")
            plan = cls(source, [], hidden, {}, {}, {}, {}, values["checkpoint"])
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

    def _add_row(self, row: dict) -> None:
        """Take over a line of the file; what says the same in two ways has to agree."""
        position = row["position"]
        where = f"sublayer {position}"
        if type(position) is not int or not 0 <= position < len(self.source.pattern):
            raise ValueError(f"position = {position!r} must be 0 to {len(self.source.pattern) - 1}")
        kind = self.source.pattern[position]
        layer = self.source.sublayers(kind).index(position)
        if (row.get("kind", kind), row.get("layer", layer)) != (kind, layer):
            raise ValueError(f"{where}: kind and layer must be {kind!r} and {layer}, which stand at that position")
        self.sublayers.append(position)
        if kind == MLP:
            self.ffn[position] = from_ranges(row["ffn"], self.source.ffn, f"{where}: ffn")
            return
        self.group[position] = from_ranges(row["groups"], self.source.num_query_groups, f"{where}: groups")
        # Their number is compared with that of the groups later.
        names = [f"{where}: heads of group {group}" for group in self.group[position]]
        names += [f"{where}: heads"] * len(row["heads"])
        per_group = self.source.heads_per_group
        self.head[position] = [from_ranges(heads, per_group, name) for heads, name in zip(row["heads"], names)]
        if "merge" in row:
            self.merge[position] = [list(partners) for partners in row["merge"]]
            if any(type(head) is not int for partners in self.merge[position] for head in partners):
                raise ValueError(f"{where}: merge must be lists of whole numbers")


def make_plan(
    scores: Scores,
    target: TargetConfig,
    parallel: ParallelConfig | None = None,
    depth_criterion: DepthCriterion | None = None,
    merge_heads: bool = False,
) -> Plan:
    """Keep the elements of highest score: rank, then cut.

    Hidden channels are ranked once for the network, neurons per MLP, query groups per attention and heads within
    their group, layers over the network. Of equal scores the lower index stays.

    Args:
        scores: of the network to prune.
        target: the shape to reach.
        parallel: the layout that the result is for; fractions are rounded to what it divides.
        depth_criterion: by which layers are chosen; None for the first that was scored.
        merge_heads: let the last kept heads take a share of the first dropped ones, see `slicing`.

    Raises:
        ConfigError: no plan can reach the target.
    """
    raise_if_any(target.problems("target."))
    wanted = resolve_target(scores.shape, target, parallel or ParallelConfig())
    return plan_for(scores, wanted, depth_criterion, merge_heads)


def plan_for(
    scores: Scores, target: Target, depth_criterion: DepthCriterion | None = None, merge_heads: bool = False
) -> Plan:
    """See `make_plan`; for a target in whole numbers."""
    source = scores.shape
    sublayers = _kept_sublayers(scores, target, depth_criterion)
    plan = Plan(
        source,
        sublayers,
        _top(scores.hidden, scores.rounds.get("hidden"), target.hidden),
        {},
        {},
        {},
        checkpoint=scores.checkpoint,
    )
    per_group = source.heads_per_group
    if merge_heads and 2 * target.heads_per_group < per_group:
        raise ConfigError(
            [
                f"merge_heads = true, and {target.heads_per_group} of {per_group} heads stay in each query group: "
                f"merging needs at least half of them; keep {-(-per_group // 2) * target.groups} heads or set "
                f"merge_heads=false"
            ]
        )
    for number, position in enumerate(source.sublayers(MLP)):
        if position in sublayers:
            plan.ffn[position] = _top(scores.ffn[number], _row(scores.rounds.get("ffn"), number), target.ffn)
    for number, position in enumerate(source.sublayers(ATTENTION)):
        if position not in sublayers:
            continue
        heads, rounds = scores.head[number], _row(scores.rounds.get("head"), number)
        plan.group[position] = _top(*group_scores(heads, rounds), target.groups)
        orders = [descending(heads[group], _row(rounds, group)).tolist() for group in plan.group[position]]
        plan.head[position] = [sorted(order[: target.heads_per_group]) for order in orders]
        if merge_heads:
            plan.merge[position] = [_partners(order, target.heads_per_group) for order in orders]
    return plan


def _kept_sublayers(scores: Scores, target: Target, criterion: DepthCriterion | None) -> list[int]:
    """Positions of the pattern that stay."""
    source, depth = scores.shape, scores.depth_settings
    kinds = {ATTENTION: target.attention, MLP: target.mlp}
    if target.keep_layers is not None:
        return [source.sublayers(kind)[layer] for layer in target.keep_layers for kind in (ATTENTION, MLP)]
    if all(len(source.sublayers(kind)) == count for kind, count in kinds.items()):
        return list(range(len(source.pattern)))
    if target.by_sublayer and depth.unit is Unit.LAYER:
        raise ConfigError(
            [
                f"target.attention = {target.attention} and target.mlp = {target.mlp} differ, and the scores are of "
                f"whole layers: score with depth.unit=sublayer"
            ]
        )
    name = criterion.value if criterion else next(iter(scores.depth), None)
    if name not in scores.depth:
        raise ConfigError(
            [
                f"depth_criterion = {name} was not scored: there are {', '.join(scores.depth) or 'none'}; "
                f"score with depth.criteria=[{name or 'block_influence'}], or set target.keep_layers"
            ]
        )
    values, rounds = scores.depth[name], scores.rounds.get("depth")
    if rounds is not None and name != next(iter(scores.depth)):
        raise ConfigError(
            [
                f"depth_criterion = {name}, and the order in which these scores leave out {depth.unit.value}s was "
                f"decided by {next(iter(scores.depth))}: leave it out, or score with {name} first in depth.criteria"
            ]
        )
    protected = set(depth.protected(len(values)))
    if depth.search is not DepthSearch.SINGLE:
        _require_searched(scores, {"layers": target.attention, "attention": target.attention, "mlp": target.mlp})
    if depth.unit is Unit.SUBLAYER:
        return sorted(
            unit
            for kind, count in kinds.items()
            for unit in _top_units(values, rounds, source.sublayers(kind), protected, count, depth)
        )
    drop = source.num_layers - target.attention
    if depth.search is DepthSearch.BLOCK:
        start = int(np.nanargmin(values.numpy()))
        layers = [layer for layer in range(source.num_layers) if not start <= layer < start + drop]
    else:
        layers = _top_units(values, rounds, list(range(len(values))), protected, target.attention, depth)
    return [position for layer in layers for position in (2 * layer, 2 * layer + 1)]


def _require_searched(scores: Scores, wanted: dict[str, int]) -> None:
    """See that the scores are of a search for as many units as the target keeps."""
    source, depth = scores.shape, scores.depth_settings
    if depth.unit is Unit.LAYER:
        units = {"layers": list(range(source.num_layers))}
    else:
        units = {"attention": source.sublayers(ATTENTION), "mlp": source.sublayers(MLP)}
    problems = []
    for name, own in units.items():
        is_greedy = depth.search is DepthSearch.GREEDY
        searched = int((scores.rounds["depth"][own] <= depth.drop).sum()) if is_greedy else depth.drop
        if len(own) - wanted[name] != searched:
            problems.append(
                f"target.{name} = {wanted[name]} leaves out {len(own) - wanted[name]} of {len(own)}, and the scores "
                f"are of leaving out {searched} ({depth.search.value}): score again with that target, or set "
                f"target.{name}={len(own) - searched}"
            )
    raise_if_any(problems)


def _top_units(
    values: Tensor, rounds: Tensor | None, units: list[int], protected: set[int], count: int, depth: DepthSettings
) -> list[int]:
    """Of some units, the `count` to keep: those that are protected, and the best of the others."""
    kept = [unit for unit in units if unit in protected]
    if count < len(kept):
        raise ConfigError(
            [
                f"target keeps {count} {depth.unit.value}s, and {len(kept)} are protected (depth.protect_first = "
                f"{depth.protect_first}, depth.protect_last = {depth.protect_last}): keep more, or score with less "
                f"protection"
            ]
        )
    others = [unit for unit in units if unit not in protected]
    return sorted(kept + [others[i] for i in _top(values[others], _row(rounds, others), count - len(kept))])


def _partners(order: list[int], kept: int) -> list[int]:
    """For each kept head, ascending, the dropped head that it takes a share of, or itself.

    With heads in order of importance, the i-th of K kept ones is paired with number 2K - i + 1, as long as there is
    such a head (2407.14679, section 2.3, whose range for i begins one too early).
    """
    partner = {order[i]: order[2 * kept - i - 1] for i in range(kept) if 2 * kept - i - 1 < len(order)}
    return [partner.get(head, head) for head in sorted(order[:kept])]


def _top(values: Tensor, rounds: Tensor | None, count: int) -> list[int]:
    """The `count` indices of highest score, ascending."""
    return sorted(descending(values, rounds)[:count].tolist())


def _row(rounds: Tensor | None, index) -> Tensor | None:
    return None if rounds is None else rounds[index]


def _pick(values: list[int], indices: list[int]) -> list[int]:
    return [values[i] for i in indices]


def _index_problems(what: str, indices: list[int], size: int) -> list[str]:
    if not indices:
        return [f"{what} keeps nothing: keep at least one"]
    found = []
    if not 0 <= min(indices) <= max(indices) < size:
        found.append(f"{what} names {min(indices)} to {max(indices)}, and there are 0 to {size - 1}")
    if any(a >= b for a, b in pairwise(indices)):
        found.append(f"{what} does not ascend, or names something twice: sort it and name each once")
    return found


def to_ranges(indices: list[int]) -> str:
    """Ascending numbers as people write them: `0-5,8,10-12`."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_ranges(text: str, size: int, what: str = "indices") -> list[int]:
    """What `to_ranges` wrote, or somebody in that form.

    Args:
        text: numbers and ranges of numbers.
        size: they are below it.
        what: it is of, for the error.
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
