"""What a step makes of its entries, against autograd on whole logits, and what it says of those that are wrong."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from minitron_megatron.config.loss import Balance, HiddenConfig, LogitsConfig, LossConfig
from minitron_megatron.config.loss import Divergence as DivergenceKind
from minitron_megatron.config.schedule import Schedule
from minitron_megatron.config.schema import DType, ParallelConfig
from minitron_megatron.distillation import live_teacher
from minitron_megatron.distillation.entries import loss_entries
from minitron_megatron.distillation.linear_losses import Predictions
from minitron_megatron.distillation.live_teacher import LiveTeacher
from minitron_megatron.distillation.losses import distillation_loss
from minitron_megatron.distillation.objectives import BalancedWeight, CrossEntropy, Divergence, Entry
from minitron_megatron.distillation.result import EntryResult, StepResult, combine
from minitron_megatron.distillation.step import DistillationStep
from minitron_megatron.distillation.teachers import Wanted
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.parallel.schedule import run_forward
from tests.gradients import close
from tests.tiny import LLAMA, Samples

VOCAB = LLAMA["vocab_size"]


def rows(first, count=2):
    samples = Samples(8, 16, VOCAB)
    items = [samples[index] for index in range(first, first + count)]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]} | {
        "sample_ids": torch.arange(first, first + count)
    }


def network(ctx, seed, **changes):
    torch.manual_seed(seed)
    [model] = build_model(network_from_config({**LLAMA, **changes}), ctx, DType.FP32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def trained(model):
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    [wrapped] = [DistributedDataParallel(config=model.config, ddp_config=ddp, module=model)]
    wrapped.zero_grad_buffer()
    return wrapped


def whole_logits(model, batch):
    return model(batch["tokens"], batch["position_ids"], None).flatten(0, 1)[:, :VOCAB]


class StoredTeacher:
    """A teacher that runs no model in a step: it looks its last hidden states up by sample id."""

    name, vocab = "stored", VOCAB

    def __init__(self, model, ctx, samples):
        self.weight = model.output_layer.weight.detach()
        self.states, self.asked = {}, []
        for batch in samples:
            [state] = run_forward([model], [batch], ctx, on_output=lambda output, batch: output)
            self.states |= dict(zip(batch["sample_ids"].tolist(), state.unbind(1), strict=True))

    def prepare(self, wanted):
        self.wanted = wanted

    def problems(self, student):
        return []

    def free(self):
        pass

    def evaluate(self, batches):
        return None

    @contextmanager
    def teach(self, batches, training):
        self.asked.append([batch["sample_ids"].tolist() for batch in batches])
        yield _StoredTargets(self, self.asked[-1])


class _StoredTargets:
    seconds, text_loss = 0.5, None

    def __init__(self, teacher, ids):
        self.teacher, self.ids = teacher, ids

    def predictions(self, number):
        states = torch.stack([self.teacher.states[index] for index in self.ids[number]], dim=1)
        return Predictions(states.flatten(0, 1), self.teacher.weight)


def test_teachers_and_objectives_of_all_kinds_add_up():
    """Two teachers, one of which is not there, three divergences and the text, as autograd has it on whole logits."""
    reverse = LogitsConfig(DivergenceKind.REVERSE_KL)
    with parallel_context(ParallelConfig()) as ctx:
        model, twin, first, second = (network(ctx, seed) for seed in (1, 1, 2, 3))
        student, batches = trained(model), [rows(0), rows(4)]
        stored = StoredTeacher(second, ctx, batches)
        live = LiveTeacher([first.requires_grad_(False)], ctx, VOCAB)
        entries = [
            Entry(live, Divergence(), 0.6),
            Entry(None, CrossEntropy(), lambda step: 0.1 * step),
            Entry(stored, Divergence(), 0.3, name="kd_stored"),
            Entry(live, Divergence(reverse), 0.2, name="kd_reverse"),
        ]
        result = DistillationStep([student], entries, ctx, VOCAB, chunk_tokens=7).train(batches, number=4)
        found = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}

        count = sum(batch["loss_mask"].sum() for batch in batches)
        terms = {
            "kd_logits": (first, None),
            "lm": (None, None),
            "kd_stored": (second, None),
            "kd_reverse": (first, reverse),
        }
        weights = {"kd_logits": 0.6, "lm": 0.4, "kd_stored": 0.3, "kd_reverse": 0.2}
        expected = dict.fromkeys(terms, 0.0)
        for batch in batches:
            text = batch["labels"].flatten(), batch["loss_mask"].flatten()
            for name, (teacher, config) in terms.items():
                target = None if teacher is None else whole_logits(teacher, batch).detach()
                of_text = 1.0 if teacher is None else 0.0
                loss = distillation_loss(whole_logits(twin, batch), *text, target, 1 - of_text, of_text, config)
                expected[name] = expected[name] + loss / count
        total = sum(weights[name] * loss for name, loss in expected.items())
        total.backward()
    assert list(result.losses) == list(terms) and len(set(result.losses.values())) == 4
    for name, loss in expected.items():
        assert result.losses[name] == pytest.approx(loss.item(), rel=1e-4), name
        assert result.entries[name].weight == pytest.approx(weights[name])
    assert result.total == pytest.approx(total.item(), rel=1e-4)
    assert result.num_tokens == count and result.teacher_s > 0.5
    assert stored.asked == [[[0, 1], [4, 5]]] and stored.wanted == Wanted(True, (), VOCAB, model.vocab_size)
    for name, parameter in twin.named_parameters():
        assert close(found[name], parameter.grad, 1e-4), name


def test_the_teachers_time_is_that_of_its_kernels(monkeypatch):
    """They run on after the calls that start them have returned."""
    with parallel_context(ParallelConfig()) as ctx:
        teacher = LiveTeacher([network(ctx, 1)], ctx, VOCAB)
        happened = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("waited"))
        monkeypatch.setattr(live_teacher, "run_forward", lambda *arguments, **options: happened.append("ran") or [])
        with teacher.teach([rows(0)], training=True) as targets:
            assert targets.text_loss is None and targets.seconds >= 0
        assert happened == ["waited", "ran", "waited"]


def test_a_teacher_lets_go_of_states_that_nobody_wants():
    with parallel_context(ParallelConfig()) as ctx:
        teacher = LiveTeacher([network(ctx, 1)], ctx, VOCAB)
        for wanted in (True, False):
            teacher.prepare(Wanted(predictions=wanted))
            with teacher.teach([rows(0)], training=False) as targets:
                assert len(targets._last_states) == wanted


class PlainCrossEntropy(CrossEntropy):
    """The same by autograd on whole logits, which an objective of one's own may compute."""

    name = "plain"

    @staticmethod
    def compute(student, text, terms, group, vocab, chunk_tokens):
        logits = (student.hidden @ student.weight.T)[:, :vocab]
        loss = (F.cross_entropy(logits, text.labels, reduction="none") * text.mask).sum()
        return terms[0].weight * loss, loss.detach().double()[None]


@pytest.mark.parametrize("tied", [False, True])
def test_an_objective_that_computes_by_itself_gives_its_gradient_beside_the_fused_ones(tied):
    found = []
    for entries in (
        [Entry(None, CrossEntropy())],
        [Entry(None, CrossEntropy(), 0.25), Entry(None, PlainCrossEntropy(), 0.75)],
    ):
        with parallel_context(ParallelConfig()) as ctx:
            model = network(ctx, 1, tie_word_embeddings=tied)
            DistillationStep([trained(model)], entries, ctx, VOCAB, chunk_tokens=7).train([rows(0), rows(4)])
            found.append({name: parameter.main_grad.clone() for name, parameter in model.named_parameters()})
    fused, mixed = found
    for name, gradient in fused.items():
        assert gradient.any() and close(mixed[name], gradient, 1e-4), name


def test_logits_that_megatron_scales_are_refused():
    with parallel_context(ParallelConfig()) as ctx:
        model = network(ctx, 1)
        model.config.use_mup = True
        with pytest.raises(ConfigError, match="config.use_mup = True"):
            LiveTeacher([model], ctx, VOCAB)


class Quiet:
    """A student that is only asked for its vocabulary."""

    vocab_size = VOCAB
    config = SimpleNamespace()


@pytest.mark.parametrize(
    "entries, message",
    [
        ([Entry(None, Divergence())], "entry kd_logits has no teacher"),
        ([Entry(None, CrossEntropy()), Entry(None, CrossEntropy(), 0.5)], "2 entries are called lm"),
        ([], "no entry looks at predictions"),
        ([Entry(None, CrossEntropy(), BalancedWeight(1.0, "kd_logits"))], "lm is balanced against kd_logits"),
        (
            [
                Entry(None, CrossEntropy(), BalancedWeight(1.0, "b")),
                Entry(None, CrossEntropy(), BalancedWeight(1.0, "lm"), "b"),
            ],
            "entries lm and b have balanced weights",
        ),
        ([Entry(None, Divergence(LogitsConfig(top_k=VOCAB + 1)))], f"top_k = {VOCAB + 1} is more than"),
    ],
)
def test_entries_that_make_no_step_are_named(entries, message):
    with parallel_context(ParallelConfig()) as ctx, pytest.raises(ConfigError, match=message):
        DistillationStep([Quiet()], entries, ctx, VOCAB)


def test_the_entries_of_settings():
    teacher, hidden = object(), SimpleNamespace(name="kd_hidden")

    def weights(loss, step, *parts):
        return {entry.name: entry.weight_at(step) for entry in loss_entries(loss, *parts)}

    assert weights(LossConfig(0.0, 1.0), 1) == {"lm": 1.0}
    assert weights(LossConfig(0.0, 0.2, hidden=HiddenConfig(0.3)), 1, teacher, hidden) == {"lm": 0.2, "kd_hidden": 0.3}
    schedule = {"lm_weight": Schedule([[1, 0.5], [5, 0.1]]), "logits.temperature": Schedule([[1, 3.0], [5, 1.0]])}
    loss = LossConfig(0.7, schedule=schedule, hidden=HiddenConfig(0.3, Balance.DYNAMIC))
    for step, lm_weight in ((1, 0.5), (3, 0.3), (5, 0.1)):
        found = weights(loss, step, teacher, hidden)
        assert found == {"lm": pytest.approx(lm_weight), "kd_logits": 0.7, "kd_hidden": 0.3}
    _, divergence, balanced = loss_entries(loss, teacher, hidden)
    assert [divergence.objective.config_at(step).temperature for step in (1, 3, 5)] == [3, 2, 1]
    balanced.weight.update(own=0.5, other=2.0)
    assert balanced.weight_at(2) == 4.0 * 0.3
    with pytest.raises(ConfigError, match=r"loss.kd_logits_weight = 0.7, and there is no teacher"):
        loss_entries(loss)
    with pytest.raises(ConfigError, match=r"loss.hidden.weight = 0.3, and there is no HiddenDistance"):
        loss_entries(loss, teacher)


def test_a_divergence_has_the_temperature_of_the_step():
    with parallel_context(ParallelConfig()) as ctx:
        student, teacher = (network(ctx, seed) for seed in (1, 2))
        live, batches = LiveTeacher([teacher.requires_grad_(False)], ctx, VOCAB), [rows(0)]

        def divergence(config, number):
            entries = [Entry(live, Divergence(config))]
            return DistillationStep([student], entries, ctx, VOCAB).evaluate(batches, number).losses["kd_logits"]

        for number in (1, 2):
            found = divergence(lambda step: LogitsConfig(temperature=float(step)), number)
            assert found == divergence(LogitsConfig(temperature=float(number)), 1)


def test_results_of_several_batches_count_every_token_once():
    def result(num_tokens, lm, pairs):
        entries = {
            "lm": EntryResult(0.5, {"lm": lm * num_tokens}, {"lm": num_tokens}),
            "kd_hidden": EntryResult(
                2.0, {n: v * num_tokens for n, v in pairs.items()}, dict.fromkeys(pairs, num_tokens)
            ),
        }
        return StepResult(entries, num_tokens, alpha=2.0)

    both = combine([result(3, 4.0, {"a": 1.0, "b": 2.0}), result(1, 8.0, {"a": 5.0, "b": 6.0})])
    assert both.num_tokens == 4 and both.alpha == 2.0
    assert both.losses == {"lm": 5.0, "kd_hidden": 2.5}
    assert both.entries["kd_hidden"].pair_losses == {"a": 2.0, "b": 3.0}
    assert both.total == 0.5 * 5.0 + 2.0 * 2.5 and both.is_finite
    nothing = combine([result(0, 0.0, {"a": 0.0, "b": 0.0})])
    assert all(map(math.isnan, [*nothing.losses.values(), nothing.total])) and not nothing.is_finite
    assert combine([result(0, 0.0, {"a": 0.0, "b": 0.0}), result(1, 8.0, {"a": 5.0, "b": 6.0})]).losses["lm"] == 8.0
