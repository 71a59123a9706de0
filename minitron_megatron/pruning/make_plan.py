"""Makes plans from scores: rank, then cut."""

import numpy as np
from torch import Tensor

from minitron_megatron.config.schema import DepthCriterion, DepthSearch, ParallelConfig, TargetConfig, Unit
from minitron_megatron.errors import ConfigError, raise_if_any
from minitron_megatron.model.layers import PrunableAxis, Sublayer
from minitron_megatron.pruning.plan import Indices, Plan
from minitron_megatron.pruning.scores import DepthSettings, Scores, descending
from minitron_megatron.pruning.target import Target, resolve_target


def make_plan(
    scores: Scores,
    target: TargetConfig,
    parallel: ParallelConfig | None = None,
    depth_criterion: DepthCriterion | None = None,
    merge_heads: bool = False,
) -> Plan:
    """Makes the plan that keeps the elements of highest score.

    Hidden channels and layers are ranked over the network, elements of an axis within their sublayer, or within each
    element of the outer axis. Among equal scores the lower index is kept.

    Args:
        scores: of the network to prune.
        target: the shape to reach.
        parallel: the layout that the result is for; fractions are rounded to what it divides.
        depth_criterion: scored criterion to choose layers by; None for the first.
        merge_heads: merge the first dropped heads into the last kept ones, see `slicing`.

    Raises:
        ConfigError: no plan can reach the target.
    """
    raise_if_any(target.problems("target."))
    wanted = resolve_target(scores.network, target, parallel or ParallelConfig())
    return plan_for(scores, wanted, depth_criterion, merge_heads)


def plan_for(
    scores: Scores, target: Target, depth_criterion: DepthCriterion | None = None, merge_heads: bool = False
) -> Plan:
    """Makes a plan for a target that is resolved to whole numbers; see `make_plan`."""
    source = scores.network
    sublayers = _kept_sublayers(scores, target, depth_criterion)
    hidden = _top(scores.hidden, scores.rounds.get("hidden"), target.hidden)
    plan = Plan(source, sublayers, hidden, {}, checkpoint=scores.checkpoint)
    for position in sublayers:
        sublayer, wanted = source.sublayers[position], target.sublayers[position]
        merged = sublayer.axis(sublayer.merged) if merge_heads and sublayer.merged else None
        if merged:
            _require_half(sublayer, wanted, merged)
        ranking = _Ranking(scores, position)
        plan.elements[position] = ranking.keep(wanted)
        if merged:
            count = wanted.sizes[merged.axis.name]
            plan.merge[position] = [_partners(order, count) for order in ranking.orders[merged.setting]]
    return plan


class _Ranking:
    """Ranks the elements of one sublayer.

    Attributes:
        orders: for axes that lie within an outer one, all indices by falling importance, for each kept outer element.
    """

    def __init__(self, scores: Scores, position: int):
        self.scores, self.position = scores, position
        self.orders: dict[str, list[list[int]]] = {}

    def keep(self, wanted: Sublayer) -> dict[str, Indices]:
        """Returns the elements of highest score by setting, as many as the smaller sublayer has."""
        kept: dict[str, Indices] = {}
        sublayer = self.scores.network.sublayers[self.position]
        for axis in sublayer.prunable:
            values, rounds = self.scores.along(self.position, axis)
            count = wanted.sizes[axis.axis.name]
            if outer := sublayer.outer(axis):
                orders = [
                    descending(values[element], _row(rounds, element)).tolist() for element in kept[outer.setting]
                ]
                kept[axis.setting] = [sorted(order[:count]) for order in orders]
                self.orders[axis.setting] = orders
            else:
                kept[axis.setting] = _top(values, rounds, count)
        return kept


def _require_half(source: Sublayer, wanted: Sublayer, axis: PrunableAxis) -> None:
    """Checks that merging can pair every dropped element with a kept one."""
    has, kept, outer = source.sizes[axis.axis.name], wanted.sizes[axis.axis.name], source.outer(axis)
    if 2 * kept < has:
        least = -(-has // 2) * (wanted.total(outer) if outer else 1)
        raise ConfigError(
            [
                f"merge_heads = true, and {kept} of {has} {axis.setting} stay in each "
                f"{outer.elements if outer else source.title}: merging needs at least half of them; keep {least} "
                f"{axis.setting} or set merge_heads=false"
            ]
        )


def _kept_sublayers(scores: Scores, target: Target, criterion: DepthCriterion | None) -> list[int]:
    """Returns the positions of the sublayers to keep."""
    source, depth = scores.network, scores.depth_settings
    if target.keep_layers is not None:
        return [position for layer in target.keep_layers for position in source.layers[layer]]
    own = {kind.name: source.positions(kind) for kind in source.kinds}
    if target.layers == len(source.layers) or (
        target.layers is None and all(len(own[name]) == count for name, count in target.counts.items())
    ):
        return list(range(len(source.sublayers)))
    if depth.unit is Unit.SUBLAYER:
        units, wanted = own, target.counts
    elif target.layers is not None:
        units, wanted = {"layers": list(range(len(source.layers)))}, {"layers": target.layers}
    else:
        counts = " and ".join(f"target.{name} = {count}" for name, count in target.counts.items())
        raise ConfigError([f"{counts} differ, and the scores are of whole layers: score with depth.unit=sublayer"])
    values, rounds = _depth_scores(scores, criterion)
    if depth.search is not DepthSearch.SINGLE:
        _require_searched(scores, units, wanted)
    if depth.search is DepthSearch.BLOCK and depth.unit is Unit.LAYER:
        start = int(np.nanargmin(values.numpy()))
        kept = [layer for layer in units["layers"] if not start <= layer < start + len(values) - wanted["layers"]]
    else:
        protected = set(depth.protected(source))
        kept = sorted(
            unit
            for name, count in wanted.items()
            for unit in _top_units(values, rounds, units[name], protected, count, depth)
        )
    if depth.unit is Unit.SUBLAYER:
        return kept
    return [position for layer in kept for position in source.layers[layer]]


def _depth_scores(scores: Scores, criterion: DepthCriterion | None) -> tuple[Tensor, Tensor | None]:
    """Returns the scores of the units by one criterion, and the round in which each was last scored."""
    name = criterion.value if criterion else next(iter(scores.depth), None)
    if name is None or name not in scores.depth:
        raise ConfigError(
            [
                f"depth_criterion = {name} was not scored: there are {', '.join(scores.depth) or 'none'}; "
                f"score with depth.criteria=[{name or 'block_influence'}], or set target.keep_layers"
            ]
        )
    rounds = scores.rounds.get("depth")
    if rounds is not None and name != next(iter(scores.depth)):
        raise ConfigError(
            [
                f"depth_criterion = {name}, and the order in which these scores leave out "
                f"{scores.depth_settings.unit.value}s was decided by {next(iter(scores.depth))}: leave it out, or "
                f"score with {name} first in depth.criteria"
            ]
        )
    return scores.depth[name], rounds


def _require_searched(scores: Scores, units: dict[str, list[int]], wanted: dict[str, int]) -> None:
    """Checks that the scores are of a search for as many units as the target keeps.

    Args:
        scores: of the search.
        units: layers, or sublayers by kind.
        wanted: how many of each stay.

    Raises:
        ConfigError: they are of a search for another number.
    """
    depth, problems = scores.depth_settings, []
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
    """Returns the `count` units to keep: the protected ones, and the best of the others."""
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
    """Returns for each kept element, ascending, the dropped one that is merged into it, or itself.

    With heads in order of importance, the i-th of K kept ones is paired with number 2K - i + 1, as long as there is
    such a head (2407.14679, section 2.3, whose range for i begins one too early).
    """
    partner = {order[i]: order[2 * kept - i - 1] for i in range(kept) if 2 * kept - i - 1 < len(order)}
    return [partner.get(element, element) for element in sorted(order[:kept])]


def _top(values: Tensor, rounds: Tensor | None, count: int) -> list[int]:
    """Returns the `count` indices of highest score, ascending."""
    return sorted(descending(values, rounds)[:count].tolist())


def _row(rounds: Tensor | None, index: int | list[int]) -> Tensor | None:
    return None if rounds is None else rounds[index]
