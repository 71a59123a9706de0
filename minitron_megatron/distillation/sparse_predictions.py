"""A teacher's predictions for a few tokens of the vocabulary: how they are taken from its logits, and their losses.

Two forms. *Sampled* predictions are tokens drawn in proportion to the teacher's probabilities, with counts. Counts
divided by the number of draws are the probabilities on average, and the gradient of KL(teacher || student) is linear in
these, so its expected value is that of the whole vocabulary (2503.16870, section 3). *Top* predictions are the most
likely tokens; whatever is made of them, the gradient is another one on average.

Functions take the logits `[tokens, rows of this rank]` of a vocabulary whose rows a tensor-parallel group splits, and
give the same result on every rank of it.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from minitron_megatron.distillation.vocab_parallel import LogSumExp, gather_columns, log_softmax, softmaxes
from minitron_megatron.parallel.collectives import gather_dim, sum_over


class SampledPredictions(NamedTuple):
    """Drawn tokens; all float32 but the ids.

    Attributes:
        ids: int64 `[tokens, most]`, each once for a position.
        shares: `[tokens, most]`: counts divided by the number of draws; 0 beyond the tokens of a position.
        entropy: `[tokens]`, of the teacher's whole prediction, in nats. It makes a KL of a cross-entropy.
    """

    ids: Tensor
    shares: Tensor
    entropy: Tensor

    def part(self, tokens: slice) -> "SampledPredictions":
        """Returns some positions."""
        return SampledPredictions(*(values[tokens] for values in self))


class TopPredictions(NamedTuple):
    """The most likely tokens, which differ for a position; all float32 but the ids.

    Attributes:
        ids: int64 `[tokens, top_k]`.
        log_probs: `[tokens, top_k]`, over the whole vocabulary, the largest first.
        log_rest: `[tokens]`, of all other tokens together.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor

    def part(self, tokens: slice) -> "TopPredictions":
        """Returns some positions."""
        return TopPredictions(*(values[tokens] for values in self))


SparsePredictions = SampledPredictions | TopPredictions


def draw(logits: Tensor, uniforms: Tensor, first_row: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Draws tokens in proportion to their probabilities.

    Args:
        logits: in float32, already divided by the temperature. They are overwritten.
        uniforms: `[tokens, draws]` in [0, 1), the same on every rank: where the cumulative probabilities are met.
        first_row: of this rank.
        group: tensor-parallel group.

    Returns:
        ids int64 `[tokens, draws]`, in the order of `uniforms`; and the entropy `[tokens]` in nats.
    """
    expected = logits.clone()
    [log_sum], [share] = softmaxes([logits], group)
    expected = sum_over(expected.mul_(logits).nan_to_num_(0.0).sum(1).mul_(share), group)  # 0 x -inf is 0
    cumulative = (logits * share[:, None]).double().cumsum(1)
    own = cumulative[:, -1:] if cumulative.size(1) else cumulative.new_zeros(len(cumulative), 1)
    ends = pad(gather_dim(own, group, dim=1).cumsum(1), (1, 0))  # where each rank's part begins and ends
    begin, end = ends[:, group.rank(), None], ends[:, group.rank() + 1, None]
    met = torch.minimum(uniforms.double() * ends[:, -1:], ends[:, -1:].nextafter(ends.new_zeros(())))
    is_own = (met >= begin) & (met < end)
    column = torch.searchsorted(cumulative, (met - begin).contiguous(), right=True)
    ids = torch.where(is_own, first_row + column.clamp(max=max(cumulative.size(1) - 1, 0)), 0)
    return sum_over(ids, group), log_sum - expected


def count_draws(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct ids of each position and how often each was drawn.

    Args:
        ids: `[tokens, draws]`, equal ones side by side.

    Returns:
        `[tokens, draws]` both, distinct ids first; counts are 0 beyond them.
    """
    is_new = pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    place = is_new.cumsum(1) - 1
    counts = torch.zeros_like(ids).scatter_add_(1, place, torch.ones_like(ids))
    return torch.zeros_like(ids).scatter_(1, place, ids), counts


def most_likely(
    logits: Tensor, top_k: int, first_row: int, group: dist.ProcessGroup, with_rest: bool = True
) -> TopPredictions:
    """Returns the `top_k` most likely tokens.

    Args:
        logits: already divided by the temperature.
        top_k: at most the vocabulary's size.
        first_row: of this rank.
        group: tensor-parallel group.
        with_rest: whether `log_rest` is needed; it is empty otherwise.
    """
    values, columns = logits.topk(min(top_k, logits.size(1)))
    missing = (0, top_k - values.size(1))
    kept, order = gather_dim(pad(values, missing, value=-torch.inf), group, dim=1).topk(top_k)
    ids = gather_dim(pad(columns + first_row, missing), group, dim=1).gather(1, order)
    log_sum = LogSumExp.apply(logits, group)
    if not with_rest:
        return TopPredictions(ids, kept - log_sum[:, None], log_sum[:0])
    return TopPredictions(ids, kept - log_sum[:, None], _log_rest(logits, ids, first_row, group) - log_sum)


def on_top(
    logits: Tensor, top: TopPredictions, tail: bool, first_row: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Restricts a student to the tokens that its teacher's top predictions are for, as `losses.on_top_k` does.

    Args:
        logits: the student's, already divided by the temperature.
        top: of the teacher.
        tail: whether all other tokens count as one more; else the teacher's probabilities are made to sum to one.
        first_row: of this rank.
        group: tensor-parallel group.

    Returns:
        log-probabilities of student and teacher `[tokens, top_k (+ 1)]`, and which of them this rank counts.
    """
    is_own, columns = own_columns(top.ids - first_row, logits.size(1))
    # Entries of other ranks are 0 in both, and no divergence sees them.
    own = torch.where(is_own, gather_columns(log_softmax(logits, group), columns), 0)
    if not tail:
        return own, torch.where(is_own, top.log_probs.log_softmax(1), 0), is_own
    rest = _log_rest(logits, top.ids, first_row, group) - LogSumExp.apply(logits, group)
    student = torch.cat([own, rest[:, None]], dim=1)
    teacher = torch.cat([torch.where(is_own, top.log_probs, 0), top.log_rest[:, None]], dim=1)
    # The first rank counts the rest.
    return student, teacher, pad(is_own, (0, 1), value=group.rank() == 0)


def own_columns(columns: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Returns which columns are rows of this rank, and a valid column for each."""
    return (columns >= 0) & (columns < num_rows), columns.clamp(0, max(num_rows - 1, 0))


def _log_rest(logits: Tensor, ids: Tensor, first_row: int, group: dist.ProcessGroup) -> Tensor:
    """Returns the log-sum-exp `[tokens]` of all tokens but those of `ids`."""
    num_rows = logits.size(1)
    is_own, columns = own_columns(ids - first_row, num_rows)
    taken = torch.zeros(len(ids), num_rows + 1, dtype=torch.bool, device=ids.device)
    taken = taken.scatter(1, torch.where(is_own, columns, num_rows), True)[:, :num_rows]
    return LogSumExp.apply(logits.masked_fill(taken, -torch.inf), group)
