"""What a plan keeps, as arrays over the sublayers of the source."""

import numpy as np

from minitron_megatron.model.shape import ATTENTION, MLP
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores


def kept_sublayers(plan: Plan, kind: str) -> np.ndarray:
    """Whether each sublayer of a kind stays `[sublayer]`."""
    return np.isin(plan.source.sublayers(kind), plan.sublayers)


def kept_groups(plan: Plan) -> np.ndarray:
    """Whether each query group stays `[attention sublayer, group]`."""
    positions = plan.source.sublayers(ATTENTION)
    kept = np.zeros((len(positions), plan.source.num_query_groups), dtype=bool)
    for number, position in enumerate(positions):
        kept[number, plan.group.get(position, [])] = True
    return kept


def kept_heads(plan: Plan) -> np.ndarray:
    """Whether each query head stays `[attention sublayer, group * heads_per_group]`."""
    source = plan.source
    positions = source.sublayers(ATTENTION)
    kept = np.zeros((len(positions), source.num_query_groups, source.heads_per_group), dtype=bool)
    for number, position in enumerate(positions):
        for group, heads in zip(plan.group.get(position, []), plan.head.get(position, []), strict=True):
            kept[number, group, heads] = True
    return kept.reshape(len(positions), -1)


def num_kept_ffn(plan: Plan) -> np.ndarray:
    """How many neurons of each MLP stay `[MLP sublayer]`; none of a dropped one's."""
    return np.array([len(plan.ffn.get(position, [])) for position in plan.source.sublayers(MLP)])


def kept_ffn_share(plan: Plan, scores: Scores) -> np.ndarray:
    """Share of each MLP's scores that its kept neurons hold `[MLP sublayer]`."""
    kept = [plan.ffn.get(position, []) for position in plan.source.sublayers(MLP)]
    of_kept = np.array([row[indices].sum() for row, indices in zip(scores.ffn.numpy(), kept, strict=True)])
    return _ratio(of_kept, scores.ffn.numpy().sum(1))


def kept_head_share(plan: Plan, scores: Scores) -> np.ndarray:
    """Share of each attention's scores that its kept heads hold `[attention sublayer]`."""
    of_heads = scores.head.flatten(1).numpy()
    return _ratio((of_heads * kept_heads(plan)).sum(1), of_heads.sum(1))


def kept_hidden_share(plan: Plan, scores: Scores) -> float:
    """Share of all hidden channels' scores that the kept ones hold."""
    hidden = scores.hidden.numpy()
    return float(_ratio(hidden[plan.hidden].sum(), hidden.sum()))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, and 0 where the whole is 0: scores of a dead layer."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
