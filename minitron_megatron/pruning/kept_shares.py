"""Computes what a plan keeps of the sublayers of its source, and its share of the scores."""

import numpy as np

from minitron_megatron.model.layers import PrunableAxis, Sublayer
from minitron_megatron.pruning.plan import Plan, flat, nested
from minitron_megatron.pruning.scores import Scores


def kept_sublayers(plan: Plan, kind: type[Sublayer]) -> np.ndarray:
    """Returns whether each sublayer of a kind is kept `[sublayer]`."""
    return np.isin(plan.source.positions(kind), plan.sublayers)


def kept_elements(plan: Plan, position: int, axis: PrunableAxis) -> np.ndarray:
    """Returns whether each element of an axis of a sublayer is kept, in the shape of its scores."""
    sublayer = plan.source.sublayers[position]
    stays = np.zeros(sublayer.score_shape(axis), dtype=bool)
    own = plan.elements.get(position)
    if own is None:
        return stays
    if (outer := sublayer.outer(axis)) is None:
        stays[flat(own[axis.setting])] = True
        return stays
    for element, within in zip(flat(own[outer.setting]), nested(own[axis.setting]), strict=True):
        stays[element, within] = True
    return stays


def kept_share(plan: Plan, scores: Scores, kind: type[Sublayer], axis: PrunableAxis) -> np.ndarray:
    """Returns the share of the scores of an axis that its kept elements hold `[sublayer of the kind]`."""
    positions = plan.source.positions(kind)
    values = [scores.of(position)[axis.setting].numpy() for position in positions]
    stays = [kept_elements(plan, position, axis) for position in positions]
    of_kept = np.array([(value * kept).sum() for value, kept in zip(values, stays, strict=True)])
    return _ratio(of_kept, np.array([value.sum() for value in values]))


def kept_hidden_share(plan: Plan, scores: Scores) -> float:
    """Returns the share of all hidden channels' scores that the kept ones hold."""
    hidden = scores.hidden.numpy()
    return float(_ratio(hidden[plan.hidden].sum(), hidden.sum()))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns `part / whole`, and 0 where the whole is 0: scores of a dead layer."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
