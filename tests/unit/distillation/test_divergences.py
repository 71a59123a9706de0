"""Every divergence, chunked and vocab-parallel, against autograd on torch's own functions in float64."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from modelopt.torch.distill.losses import LogitsDistillationLoss
from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

from minitron_megatron.config.compose import compose
from minitron_megatron.config.loss import Divergence, LogitsConfig, LossConfig
from minitron_megatron.config.schedule import Schedule, Shape
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.distillation.linear_losses import Predictions
from minitron_megatron.distillation.losses import distillation_loss
from minitron_megatron.errors import ConfigError, raise_if_any
from minitron_megatron.parallel.context import parallel_context
from tests.ranks import run_on_ranks
from tests.unit.distillation.cases import PADDED, TOKENS, VOCAB, Case


def kl(p, q):
    """KL(p || q) of probabilities."""
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


# Of the student's probabilities p and the teacher's q.
FORMULAS = {
    Divergence.FORWARD_KL: lambda p, q, how: kl(q, p),
    Divergence.REVERSE_KL: lambda p, q, how: kl(p, q),
    Divergence.JENSEN_SHANNON: lambda p, q, how: (
        how.beta * kl(q, how.beta * q + (1 - how.beta) * p) + (1 - how.beta) * kl(p, how.beta * q + (1 - how.beta) * p)
    ),
    Divergence.SKEWED_KL: lambda p, q, how: kl(q, how.skew * q + (1 - how.skew) * p),
    Divergence.TOTAL_VARIATION: lambda p, q, how: (p - q).abs().sum(-1) / 2,
    Divergence.MSE: lambda p, q, how: F.mse_loss(p, q, reduction="none").sum(-1),
    Divergence.COSINE: lambda p, q, how: 1 - F.cosine_similarity(p, q, dim=-1),
}
SETTINGS = {
    "plain": {},
    "temperature": dict(temperature=2.0),
    "cold, not squared": dict(temperature=0.7, temperature_squared=False),
    "top-k": dict(top_k=5),
    "top-k and tail": dict(top_k=5, tail=True, temperature=1.5),
    "more than a rank has": dict(top_k=30, tail=True),
}
CONFIGS = {
    f"{kind.value}, {name}": LogitsConfig(kind, beta=0.3, **settings)
    for kind, (name, settings) in itertools.product(Divergence, SETTINGS.items())
    if LogitsConfig(kind, **settings).problems() == []
}
WEIGHTS = 0.7, 0.4


def by_torch(case, kd_weight, lm_weight):
    """Loss, and its gradients by hidden states and output weight."""
    how = case.config
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
    logits = hidden @ weight[:VOCAB].T
    teacher = case.teacher.hidden @ case.teacher.weight[:VOCAB].T
    p, q = (F.softmax(z / how.temperature, dim=-1) for z in (logits, teacher))
    if how.top_k:
        columns = teacher.topk(how.top_k).indices
        p, q = p.gather(1, columns), q.gather(1, columns)
        if how.tail:
            p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], dim=1) for x in (p, q))
        else:
            q = q / q.sum(1, keepdim=True)
    of_tokens = FORMULAS[how.divergence](p, q, how)
    if how.temperature_squared:
        of_tokens = of_tokens * how.temperature**2
    loss = kd_weight * of_tokens + lm_weight * F.cross_entropy(logits, case.labels, reduction="none")
    loss = (loss * case.mask).sum()
    loss.backward()
    return loss.item(), hidden.grad, weight.grad


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def all_divergences(folder, num_ranks):
    """Everything that is compared, by one of some tensor-parallel ranks. With four, the last one's rows are padding."""
    found = {}
    with parallel_context(ParallelConfig(tensor=num_ranks)) as ctx:
        for name, config in CONFIGS.items():
            found[name] = Case(dtype=torch.float64, config=config).linear(ctx.collection.tp, *WEIGHTS, 12)
        torch.save(found, folder / f"{dist.get_rank()}.pt")


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda count: f"tp{count}")
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(request.param, all_divergences, folder, request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_torch(name, ranks):
    case = Case(dtype=torch.float64, config=CONFIGS[name])
    loss, of_hidden, of_weight = by_torch(case, *WEIGHTS)
    of_ranks = [rank[name] for rank in ranks]
    for found_loss, _, _, terms in of_ranks:
        assert found_loss == pytest.approx(loss, rel=1e-9)
        assert torch.equal(terms, of_ranks[0][3])
    # Of the hidden states every rank has its share; of the weights its rows.
    assert_close(sum(found[1] for found in of_ranks), of_hidden)
    assert_close(torch.cat([found[2] for found in of_ranks]), of_weight)
    kd, lm = of_ranks[0][3].tolist()
    assert WEIGHTS[0] * kd + WEIGHTS[1] * lm == pytest.approx(loss, rel=1e-9)
    # The definitions that people read say the same.
    assert case.plain(*WEIGHTS)[0] == pytest.approx(loss, rel=1e-9)
    assert_close(case.plain(*WEIGHTS)[1], of_hidden)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_kl_at_a_temperature_is_that_of_model_optimizer(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    expected = LogitsDistillationLoss(temperature=temperature, reduction="sum")(logits, teacher)
    how = LogitsConfig(temperature=temperature)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    found = distillation_loss(logits, labels, torch.ones(TOKENS), teacher, 1.0, 0.0, how)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)


def modelopts_kl_for_megatron(folder, num_ranks):
    """The loss of ModelOpt's plug-in on this rank's logits against ours, and the gradients of both."""
    with parallel_context(ParallelConfig(tensor=num_ranks)) as ctx:
        group = ctx.collection.tp
        config = TransformerConfig(
            num_layers=1, hidden_size=num_ranks, num_attention_heads=num_ranks, tensor_model_parallel_size=num_ranks
        )
        for reverse, kind in ((False, Divergence.FORWARD_KL), (True, Divergence.REVERSE_KL)):
            for temperature in (1.0, 1.7):
                how = LogitsConfig(kind, temperature=temperature, temperature_squared=False)
                case = Case(vocab=PADDED, config=how)  # no padding, which ModelOpt does not know of
                loss, of_hidden, of_weight, _ = case.linear(group, 1.0, 0.0, 7)
                rows = slice(group.rank() * PADDED // num_ranks, (group.rank() + 1) * PADDED // num_ranks)
                hidden, weight = case.hidden.clone().requires_grad_(), case.weight[rows].clone().requires_grad_()
                teacher = case.teacher.hidden @ case.teacher.weight[rows].T
                theirs = LogitsKLLoss(config, temperature, reverse)
                of_tokens, is_partial, _ = theirs((hidden @ weight.T).unsqueeze(1), teacher.unsqueeze(1))
                assert is_partial
                expected = (reduce_from_tensor_model_parallel_region(of_tokens, group=group)[0] * case.mask).sum()
                expected.backward()
                assert loss == pytest.approx(expected.item(), rel=1e-5)
                torch.testing.assert_close(of_weight, weight.grad, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(of_hidden, hidden.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_kl_both_ways_is_modelopts_for_megatron(tmp_path, num_ranks):
    run_on_ranks(num_ranks, modelopts_kl_for_megatron, tmp_path, num_ranks)


# The teacher's top k, made to sum to one, are not the student's.
@pytest.mark.parametrize("name", [name for name, how in CONFIGS.items() if how.tail or not how.top_k])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    case = Case(dtype=torch.float64, config=CONFIGS[name])
    case.teacher = Predictions(case.hidden, case.weight)
    with parallel_context(ParallelConfig()) as ctx:
        loss, of_hidden, of_weight, _ = case.linear(ctx.collection.tp, 1.0, 0.0, 7)
    assert abs(loss) < 1e-6 and of_hidden.abs().max() < 1e-7 and of_weight.abs().max() < 1e-7


@pytest.mark.parametrize("kind", Divergence, ids=lambda kind: kind.value)
def test_predictions_that_have_nothing_in_common_have_finite_gradients(kind):
    case = Case(config=LogitsConfig(kind))
    case.hidden *= 100
    case.teacher.hidden.mul_(100)
    with parallel_context(ParallelConfig()) as ctx:
        loss, of_hidden, of_weight, _ = case.linear(ctx.collection.tp, 1.0, 0.1, 7)
    assert torch.tensor(loss).isfinite() and of_hidden.isfinite().all() and of_weight.isfinite().all()


def test_settings_go_where_their_schedules_send_them():
    schedule = {
        "lm_weight": Schedule([[1, 1.0], [5, 0.2]]),
        "hidden.weight": Schedule([[1, 0.0], [5, 2.0]], Shape.COSINE),
        "logits.temperature": Schedule([[2, 4.0], [4, 1.0]], Shape.CONSTANT),
        "kd_logits_weight": Schedule([[3, 0.5]]),
    }
    loss = LossConfig(schedule=schedule)
    assert not loss.problems()
    steps = [loss.at(step) for step in range(1, 8)]
    assert [own.lm_weight for own in steps] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    half = 0.5**0.5
    assert [own.hidden.weight for own in steps] == pytest.approx([0, 1 - half, 1, 1 + half, 2, 2, 2])
    assert [own.logits.temperature for own in steps] == [4, 4, 4, 1, 1, 1, 1]
    assert {own.kd_logits_weight for own in steps} == {0.5}
    largest = loss.largest
    assert (largest.lm_weight, largest.hidden.weight, largest.logits.temperature) == (1, 2, 4)
    assert loss.needs_teacher and LossConfig(0.0, schedule=schedule).needs_teacher
    assert loss.hidden.weight == 0 and loss.logits.temperature == 1  # the settings themselves stay


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("lm_wait:{points:[[1,1.0]]}", "schedule has lm_wait, which cannot change: did you mean lm_weight?"),
        ("lm_weight:0.5", "schedule.lm_weight = 0.5: must be settings, as in loss.schedule.lm_weight.points=VALUE"),
        ("lm_weight:{points:[]}", "loss.schedule.lm_weight.points = []: write pairs of a step, from 1, and a value"),
        ("lm_weight:{points:[[0,1.0]]}", "write pairs of a step"),
        ("lm_weight:{points:[[1.5,1.0]]}", "write pairs of a step"),
        ("lm_weight:{points:[[5,1.0],[5,2.0]]}", "has the steps 5, 5: each must be later than the one before"),
        ("lm_weight:{points:[[1,1.0]],shape:square}", "shape = 'square': must be one of linear, cosine, constant"),
        ("lm_weight:{points:[[1,1.0]],to:3}", "loss.schedule.lm_weight.to is not a setting"),
        ("lm_weight:{points:[[1,1.0],[9,-1.0]]}", "loss.lm_weight = -1.0"),
        ("logits.temperature:{points:[[1,2.0],[9,0.0]]}", "loss.logits.temperature = 0.0: must be above 0"),
        (
            "logits.skew:{points:[[1,0.1],[9,0.5]]}",
            "schedule has logits.skew, which loss.logits.divergence = forward_kl",
        ),
        ("kd_logits_weight:{points:[[1,1],[9,0]]}", "loss.lm_weight are both 0 at step 9: raise one"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(setting, problem):
    with pytest.raises(ConfigError) as error:
        config = compose("distill", ["teacher=t", "student=s", "output=o", f"loss.schedule={{{setting}}}"])
        raise_if_any(config.problems())
    assert problem in str(error.value)


def test_a_setting_beside_its_schedule_has_to_agree_with_it():
    schedule = {"lm_weight": Schedule([[1, 0.2], [5, 0.1]])}
    assert not LossConfig(lm_weight=0.2, schedule=schedule).problems()
    [problem] = LossConfig(lm_weight=0.5, schedule=schedule).problems()
    assert problem == "loss.lm_weight = 0.5, and loss.schedule.lm_weight begins with 0.2: leave out the first one"


def test_top_k_alone_is_refused_where_agreement_would_not_be_best():
    for kind in Divergence:
        problems = LogitsConfig(kind, top_k=5).problems()
        assert bool(problems) == (kind in (Divergence.REVERSE_KL, Divergence.COSINE))
        assert LogitsConfig(kind, top_k=5, tail=True).problems() == []
