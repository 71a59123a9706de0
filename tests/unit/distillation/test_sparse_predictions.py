"""Predictions for a few tokens: what is drawn is right on average, and its losses are those of a few lines of torch."""

import pytest
import torch
from scipy.stats import chi2

from minitron_megatron.config.loss import Divergence, LogitsConfig
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.distillation.linear_losses import linear_distillation_loss
from minitron_megatron.distillation.losses import divergence, on_top_k
from minitron_megatron.distillation.sparse_predictions import SampledPredictions, count_draws, draw, most_likely
from minitron_megatron.parallel.context import parallel_context
from tests.ranks import run_on_ranks
from tests.unit.distillation.cases import PADDED, Case

DRAWS, TOP_K = 6, 5
KD, LM = 0.7, 0.4
TEMPERED = LogitsConfig(temperature=2.0)
TOP = [
    LogitsConfig(kind, temperature, top_k=TOP_K, tail=tail)
    for kind, temperature, tail in [
        (Divergence.FORWARD_KL, 1.0, False),
        (Divergence.FORWARD_KL, 2.0, True),
        (Divergence.REVERSE_KL, 1.0, True),
        (Divergence.JENSEN_SHANNON, 1.0, True),
    ]
]


def teacher_logits(case):
    return case.teacher.hidden @ case.teacher.weight[: case.vocab].T


def own_logits(case, group):
    """This rank's rows of the teacher's logits, and the first of them."""
    rows = PADDED // group.size()
    first = group.rank() * rows
    return teacher_logits(case)[:, first : first + rows].clone(), first


def uniforms(tokens, draws, seed=0):
    within = torch.rand(tokens, draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.arange(draws) + within) / draws


def sampled(case, group, temperature=1.0):
    logits, first = own_logits(case, group)
    ids, entropy = draw(logits / temperature, uniforms(len(logits), DRAWS), first, group)
    ids, counts = count_draws(ids)
    return SampledPredictions(ids, counts.to(logits.dtype) / DRAWS, entropy)


def of_formula(case, loss_of_logits):
    """Loss and gradients by autograd on whole logits, for a divergence of `[tokens]`."""
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
    logits = hidden @ weight[: case.vocab].T
    text = torch.nn.functional.cross_entropy(logits, case.labels, reduction="none")
    loss = ((KD * loss_of_logits(logits) + LM * text) * case.mask).sum()
    loss.backward()
    return loss.item(), hidden.grad, weight.grad


def of_sampled(case, predictions, config):
    def loss(logits):
        student = (logits / config.temperature).log_softmax(1)
        drawn = (student.gather(1, predictions.ids) * predictions.shares).sum(1)
        return config.scale * (-drawn - predictions.entropy)

    return of_formula(case, loss)


def of_top(case, config):
    def loss(logits):
        student, teacher = ((own / config.temperature).log_softmax(1) for own in (logits, teacher_logits(case)))
        return divergence(*on_top_k(student, teacher, config.top_k, config.tail), config)

    return of_formula(case, loss)


def ours(case, group, predictions, config, chunk_tokens=7):
    rows = PADDED // group.size()
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight[group.rank() * rows :][:rows].clone().requires_grad_()
    loss, _ = linear_distillation_loss(
        hidden, weight, case.labels, case.mask, group, case.vocab, predictions, KD, LM, chunk_tokens, config
    )
    loss.backward()
    return loss.item(), hidden.grad, weight.grad


def all_losses(group):
    """Each case's loss and gradients, and what they should be."""
    for config in (LogitsConfig(), TEMPERED):
        case = Case(dtype=torch.float64, config=config)
        predictions = sampled(case, group, config.temperature)
        yield ours(case, group, predictions, config), of_sampled(case, predictions, config)
    for config in TOP:
        case = Case(dtype=torch.float64, config=config)
        logits, first = own_logits(case, group)
        predictions = most_likely(logits / config.temperature, TOP_K, first, group)
        yield ours(case, group, predictions, config), of_top(case, config)


def on_ranks(folder):
    with parallel_context(ParallelConfig(tensor=2)) as ctx:
        rank = ctx.tensor_rank
        torch.save(list(all_losses(ctx.collection.tp)), folder / f"{rank}.pt")
        torch.save(sampled(Case(dtype=torch.float64), ctx.collection.tp), folder / f"drawn_{rank}.pt")


@pytest.fixture
def group():
    with parallel_context(ParallelConfig()) as ctx:
        yield ctx.collection.tp


def test_losses_and_gradients_are_those_of_the_formulas(group):
    for found, expected in all_losses(group):
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-9)


def test_two_ranks_share_them(tmp_path, group):
    run_on_ranks(2, on_ranks, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for ((loss, hidden, weight), expected), ((other, *shares), _) in zip(first, second, strict=True):
        assert loss == other == pytest.approx(expected[0], rel=1e-6)
        torch.testing.assert_close(hidden + shares[0], expected[1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(torch.cat([weight, shares[1]]), expected[2], rtol=1e-6, atol=1e-9)
    drawn = [torch.load(tmp_path / f"drawn_{rank}.pt", weights_only=False) for rank in (0, 1)]
    for own, other in zip(drawn[0], sampled(Case(dtype=torch.float64), group), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=0)
    assert all(map(torch.equal, *drawn))


def test_draws_are_right_on_average_and_the_most_likely_tokens_are_not(group):
    """A chi-square test of the mean gradient over 2,000 draws against that of the whole KL."""
    case, runs = Case(vocab=12, dtype=torch.float64), 2000
    logits, student = teacher_logits(case)[:1] / 3, (case.hidden @ case.weight[:12].T)[:1].softmax(1)
    teacher = logits.softmax(1)
    ids, entropy = draw(logits.expand(runs, -1).clone(), uniforms(runs, DRAWS, seed=1), 0, group)
    shares = torch.nn.functional.one_hot(ids, 12).double().mean(1)
    assert entropy[0] == pytest.approx(-(teacher * teacher.log()).sum().item())

    # Components that never differ have no part; the last one follows from the others.
    inverse = torch.linalg.pinv(torch.cov((student - shares).T) / runs, rtol=1e-6, hermitian=True)

    def p_value(gradient):
        off = (gradient - (student - teacher)).squeeze()
        return chi2.sf(float(off @ inverse @ off), int(torch.linalg.matrix_rank(inverse, hermitian=True)))

    assert p_value((student - shares).mean(0)) > 0.05
    kept, columns = teacher.topk(TOP_K)
    of_top = torch.zeros_like(teacher).scatter(1, columns, kept / kept.sum())
    assert p_value(student - of_top) < 1e-6


def test_equal_draws_are_counted():
    ids, counts = count_draws(torch.tensor([[3, 3, 3, 7], [1, 2, 2, 9], [5, 5, 5, 5]]))
    assert ids[:, 0].tolist() == [3, 1, 5] and ids[1, :3].tolist() == [1, 2, 9]
    assert counts.tolist() == [[3, 1, 0, 0], [1, 2, 1, 0], [4, 0, 0, 0]]
