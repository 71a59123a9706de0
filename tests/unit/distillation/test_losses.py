"""The chunked, vocab-parallel loss against autograd on whole float64 logits, and against NVIDIA's Model Optimizer."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from modelopt.torch.distill.losses import LogitsDistillationLoss
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_megatron.config.loss import Divergence, HiddenLoss, LogitsConfig
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.distillation import hidden, linear_losses
from minitron_megatron.distillation.linear_losses import Predictions, linear_distillation_loss
from minitron_megatron.distillation.losses import forward_kl
from minitron_megatron.parallel.context import parallel_context
from tests.ranks import run_on_ranks
from tests.rounding import assert_as_precise, of_operations, unit_roundoff
from tests.unit.distillation.cases import PADDED, STUDENT, VOCAB, Case

WEIGHTS = {"kd": (0.7, 0.0), "lm": (0.0, 0.4), "both": (0.7, 0.4)}


@pytest.fixture
def group():
    with parallel_context(ParallelConfig()) as ctx:
        yield ctx.collection.tp


def assert_close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 256])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_loss_and_gradients_are_those_of_whole_logits(weights, chunk_tokens, group, monkeypatch):
    monkeypatch.setattr(linear_losses, "_WEIGHT_ROWS", 8)  # which the vocabulary is no multiple of
    case = Case()
    loss, grad_hidden, grad_weight, terms = case.linear(group, *weights, chunk_tokens, scale=3.0)
    expected_loss, expected_hidden, expected_weight = case.plain(*weights, scale=3.0)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(grad_hidden, expected_hidden)
    assert_close(grad_weight, expected_weight)
    # Masked tokens and rows that pad the vocabulary get none at all.
    assert not grad_hidden[case.mask == 0].any() and grad_hidden[case.mask == 1].any(1).all()
    assert not grad_weight[VOCAB:].any() and grad_weight[:VOCAB].any(1).all()
    for term, alone in zip(terms.tolist(), ((1.0, 0.0), (0.0, 1.0)), strict=True):
        if alone[0] == 0 or weights[0]:  # without a teacher there is no divergence
            assert term == pytest.approx(case.plain(*alone)[0], rel=1e-6)


@pytest.mark.parametrize("divergence", [Divergence.FORWARD_KL, Divergence.MSE])
@pytest.mark.parametrize("student, teacher", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_teacher_of_another_number_format(student, teacher, divergence, group):
    case = Case(config=LogitsConfig(divergence=divergence))
    # What each format makes of the inputs is no fault of the loss.
    inputs = [x.to(student) for x in (case.hidden, case.weight)]
    of_teacher = Predictions(*(x.to(teacher) for x in (case.teacher.hidden, case.teacher.weight)))
    case.hidden, case.weight = (x.double() for x in inputs)
    case.teacher = Predictions(of_teacher.hidden.double(), of_teacher.weight.double())
    expected = case.plain(0.7, 0.4)
    (case.hidden, case.weight), case.teacher = inputs, of_teacher
    loss, grad_hidden, grad_weight, _ = case.linear(group, 0.7, 0.4, 7)
    assert grad_hidden.dtype is grad_weight.dtype is student
    assert loss == pytest.approx(expected[0], rel=0, abs=case.loss_error(0.7, 0.4))
    plain = case.in_its_formats(0.7, 0.4)
    for found, other, exact in zip((grad_hidden, grad_weight), plain[1:], expected[1:], strict=True):
        # The teacher's format is the coarser one where it is not the student's.
        assert_as_precise(found, other, exact, student)


def test_a_vocabulary_without_padding(group):
    case = Case(vocab=64, padded=64)
    loss, _, grad_weight, _ = case.linear(group, 0.7, 0.4, 7)
    expected_loss, _, expected = case.plain(0.7, 0.4)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(grad_weight, expected)


def test_blocks_of_rows_within_a_chunk_change_nothing(group, monkeypatch):
    whole = Case().linear(group, 0.7, 0.4, 23)
    monkeypatch.setattr(linear_losses, "_CACHE_ELEMENTS", 3 * PADDED)
    blocks = Case().linear(group, 0.7, 0.4, 23)
    assert blocks[0] == pytest.approx(whole[0], rel=1e-6)
    assert_close(blocks[1], whole[1].double())


def test_a_rank_without_true_rows_still_has_blocks():
    """On CUDA a block is the whole matrix, of which such a rank has nothing."""
    assert linear_losses._block(0, 10, is_cuda=True) == 1
    assert linear_losses._block(40, 10, is_cuda=True) == 40


def test_nothing_is_computed_for_gradients_that_nobody_wants(group, monkeypatch):
    case = Case()
    arguments = case.labels, case.mask, group, case.vocab, case.teacher, 0.7, 0.4
    weight = case.weight.requires_grad_()
    expected, _ = linear_distillation_loss(case.hidden, weight, *arguments)
    monkeypatch.setattr(linear_losses, "_WEIGHT_ROWS", 0)  # no step of a range: computing the gradient would fail
    with torch.no_grad():
        loss, _ = linear_distillation_loss(case.hidden, weight, *arguments)
    assert loss == expected and not loss.requires_grad


def test_logits_as_large_as_exponentials_allow(group):
    case = Case()
    case.hidden *= 100
    case.teacher.hidden.mul_(100)
    loss, grad_hidden, grad_weight, _ = case.linear(group, 0.7, 0.4, 7)
    expected_loss, expected_hidden, _ = case.plain(0.7, 0.4)
    assert expected_loss > 1e4 and loss == pytest.approx(expected_loss, rel=1e-5)
    assert grad_weight.isfinite().all()
    # Of logits of some hundreds what is lost in float32 is large beside probabilities.
    assert_as_precise(grad_hidden, case.in_its_formats(0.7, 0.4)[1], expected_hidden, torch.float32)


def test_the_divergence_is_that_of_model_optimizer(group):
    case = Case()
    hidden = case.hidden.clone().requires_grad_()
    teacher_logits = (case.teacher.hidden @ case.teacher.weight.T)[:, :VOCAB]
    logits = (hidden @ case.weight.T)[:, :VOCAB]
    of_tokens = LogitsDistillationLoss(temperature=1.0, reduction="none")(logits, teacher_logits)
    own = forward_kl(logits.log_softmax(-1), teacher_logits.log_softmax(-1))
    torch.testing.assert_close(own, of_tokens, rtol=1e-5, atol=1e-5)
    expected = (of_tokens * case.mask).sum()
    expected.backward()
    loss, grad_hidden, _, _ = case.linear(group, 1.0, 0.0, 7)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert_close(grad_hidden, hidden.grad.double())


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(group):
    case = Case()
    case.teacher = Predictions(case.hidden, case.weight)
    loss, grad_hidden, grad_weight, _ = case.linear(group, 1.0, 0.0, 7)
    assert abs(loss) < 1e-4
    assert grad_hidden.abs().max() < 1e-5 and grad_weight.abs().max() < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_added_to_megatrons_buffer_in_float32(tied, group):
    """For a tied weight `.grad` is what Megatron adds to the buffer itself, so that it must hold the embedding's share
    alone; for any other a flag says that the buffer has it already."""
    case = Case()
    weight = torch.nn.Parameter(case.weight.bfloat16())
    weight.main_grad = torch.full_like(case.weight, 0.5)
    if tied:
        weight.zero_out_wgrad = True
    else:
        weight.grad_added_to_main_grad = False
    case.weight, case.hidden = weight.detach().float(), case.hidden.bfloat16()
    teacher = case.teacher
    case.teacher = Predictions(teacher.hidden.bfloat16(), teacher.weight.bfloat16())
    # So small that bfloat16's 8 bits would hold nothing of it beside 0.5.
    scale = 2.0**-10
    case.linear(group, 0.7, 0.4, 7, scale, weight)
    *_, expected = case.plain(0.7, 0.4, scale)
    assert expected.abs().max() < 0.5 * unit_roundoff(torch.bfloat16) * 8
    found = weight.main_grad.double() - 0.5
    assert weight.main_grad.dtype is torch.float32
    assert not found[VOCAB:].any()
    case.weight = weight.detach()
    *_, plain = case.in_its_formats(0.7, 0.4, scale)
    assert_as_precise(found, plain, expected, torch.bfloat16)
    if tied:
        assert weight.grad is None
    else:
        assert weight.grad_added_to_main_grad


def test_a_small_gradient_is_not_lost_among_many_chunks(group):
    """Each chunk's product has bfloat16's 8 bits; were their sum kept in it too, most of 1023 equal ones would be lost
    beside the first, which is larger."""
    case, tokens = Case(), 1024
    case.hidden, case.labels = torch.ones(tokens, STUDENT).bfloat16(), torch.full((tokens,), 3)
    case.hidden[0] *= 64
    case.weight = torch.nn.Parameter(torch.zeros(PADDED, STUDENT).bfloat16())
    case.weight.main_grad = torch.zeros(PADDED, STUDENT)
    case.mask = torch.ones(tokens)
    case.linear(group, 0.0, 1.0, 1, weight=case.weight)
    # What is rounded is the gradient by the logit, the same for every token; its products with powers of two are not.
    slope = torch.tensor(1 / VOCAB - 1).bfloat16().item()
    error = of_operations(tokens, torch.float32)
    assert case.weight.main_grad[3, 0].item() == pytest.approx((64 + tokens - 1) * slope, rel=error)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and func is not torch.ops.aten.detach.default:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(
    "config",
    [None, *(LogitsConfig(kind) for kind in Divergence), LogitsConfig(temperature=2), LogitsConfig(top_k=9, tail=True)],
    ids=lambda config: str(config and (config.divergence.value, config.temperature, config.top_k)),
)
def test_logits_of_more_than_a_chunk_never_exist(config, group):
    tokens, hidden, vocab, chunk = 128, 2, 1000, 8
    case = Case(config=config)
    case.hidden, case.weight, case.vocab = torch.randn(tokens, hidden), torch.randn(vocab, hidden), vocab
    case.teacher = Predictions(torch.randn(tokens, hidden), torch.randn(vocab, hidden))
    case.labels, case.mask = torch.randint(0, vocab, (tokens,)), torch.ones(tokens)
    with LargestTensor() as largest:
        case.linear(group, 0.7, 0.4, chunk)
    # Scratch space of student, teacher and their difference, and at a temperature of the student without it.
    parts = 3 + (config is not None and config.temperature != 1)
    assert largest.numel <= parts * chunk * vocab


def of_two_ranks(folder):
    """Everything that is compared, by one of two tensor-parallel ranks. The second one's rows are all padding
    where the vocabulary is 29, and partly so where it is 37. Work goes in blocks of three tokens."""
    found = {}
    linear_losses._CACHE_ELEMENTS = 3 * PADDED // 2
    with parallel_context(ParallelConfig(tensor=2)) as ctx:
        for vocab, (name, weights) in itertools.product((29, 37, 64), WEIGHTS.items()):
            found[vocab, name] = Case(vocab).linear(ctx.collection.tp, *weights, 5)
        torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_two_ranks_share_the_loss_and_its_gradients(tmp_path):
    run_on_ranks(2, of_two_ranks, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for (vocab, name), (loss, grad_hidden, grad_weight, terms) in ranks[0].items():
        expected_loss, expected_hidden, expected_weight = Case(vocab).plain(*WEIGHTS[name])
        other = ranks[1][vocab, name]
        assert loss == other[0] == pytest.approx(expected_loss, rel=1e-6)
        assert torch.equal(terms, other[3])
        # Of the hidden states every rank has its share; of the weights its rows.
        assert_close(grad_hidden + other[1], expected_hidden)
        assert_close(torch.cat([grad_weight, other[2]]), expected_weight)
        if vocab == 29:
            assert not other[1].any() and not other[2].any()


@pytest.mark.parametrize("is_projected", [False, True], ids=["equal widths", "projected"])
@pytest.mark.parametrize("kind", HiddenLoss)
def test_a_loss_between_states_has_the_gradients_of_its_formula(kind, is_projected, monkeypatch):
    monkeypatch.setattr(hidden, "_CONTRAST_TOKENS", 4)  # of which the tokens are no multiple
    torch.manual_seed(0)
    state, target, weight, mask = torch.randn(5, 3, 8), torch.randn(5, 3, 8), torch.randn(8, 8), torch.rand(5, 3) > 0.3
    state, target, weight = (x.double().requires_grad_(x is not target) for x in (state, target, weight))
    projection = weight if is_projected else None
    others, further = target.flatten(0, 1), torch.randn(6, 8, dtype=torch.float64)  # of another rank, before this one's
    compare = partial(hidden._errors, kind=kind)
    if kind is HiddenLoss.INFONCE:
        of_all = torch.nn.functional.normalize(torch.cat([further, others]), dim=1)
        counts = torch.cat([torch.tensor([1, 0, 1, 1, 0, 1]), mask.flatten()]) > 0
        compare = hidden._Contrast(of_all, counts, len(further), 0.5)
    error, loss = hidden._StateLoss.apply(state, projection, target, mask, compare, 0.37)
    loss.backward()
    found = state.grad, weight.grad
    state.grad = weight.grad = None

    projected = state @ weight.T if is_projected else state
    expected = 0

    def cosine(ours, theirs):
        return ours @ theirs / (ours @ ours).sqrt() / (theirs @ theirs).sqrt()

    for ours, theirs, is_counted in zip(projected.flatten(0, 1), others, mask.flatten(), strict=True):
        if is_counted and kind is HiddenLoss.COSINE:
            expected = expected + 1 - cosine(ours, theirs)
        elif is_counted and kind is HiddenLoss.INFONCE:
            candidates = [*further[[0, 2, 3, 5]], *others[mask.flatten()]]
            expected = expected - (cosine(ours, theirs) / 0.5).exp().log()
            expected = expected + sum((cosine(ours, other) / 0.5).exp() for other in candidates).log()
        elif is_counted:
            expected = expected + ((ours - theirs) ** 2).sum() / len(ours)
    (0.37 * expected).backward()
    torch.testing.assert_close(error, expected.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip(found, (state.grad, weight.grad), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
