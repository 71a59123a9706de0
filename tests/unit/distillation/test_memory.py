"""The estimate of a step's memory against models that are built, and against published formulas and figures."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron_megatron.config.loss import Divergence, HiddenConfig, LogitsConfig, LossConfig
from minitron_megatron.config.schema import DistillConfig, DType, OptimizerConfig, ParallelConfig
from minitron_megatron.config.teachers import TeacherConfig
from minitron_megatron.distillation.linear_losses import Predictions, linear_distillation_loss
from minitron_megatron.distillation.memory import GIB, _stage_memory, estimate_memory
from minitron_megatron.distillation.nearest_layout import nearest_layout
from minitron_megatron.distillation.step_time import estimate_step
from minitron_megatron.fit_check import _largest_at_once
from minitron_megatron.model.build import build_model
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP, Activation
from minitron_megatron.model.memory_estimate import rank_parameters, sublayer_activations
from minitron_megatron.model.network import Network, layout_problems, transformer
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.parallel.gpus import GPUS
from minitron_megatron.parallel.schedule import forward_hidden
from minitron_megatron.training.optimizer import setup_optimizer
from tests.tiny import changed

TEACHER = Network(
    transformer(32, [Attention(num_heads=32, num_query_groups=8, head_dim=128), MLP(ffn_hidden_size=14336)]),
    hidden_size=4096,
    vocab_size=128256,
    padded_vocab_size=128256,
)
STUDENT = changed(TEACHER, hidden_size=3072, ffn_hidden_size=9216)  # Llama-3.1-Minitron 4B Width
SMALL = Network(
    transformer(5, [Attention(num_heads=8, num_query_groups=4, head_dim=24), MLP(ffn_hidden_size=448)]),
    hidden_size=256,
    vocab_size=1000,
    padded_vocab_size=1024,
)


def settings(sequence_length: int = 128, **changes) -> DistillConfig:
    config = DistillConfig(teacher="teacher", student="student", output="output", **changes)
    config.data.sequence_length = sequence_length
    return config


LLAMA_RUN = settings(8192, global_batch=128, micro_batch=4)


@pytest.mark.parametrize("dtype, plain, distributed", [("bf16", 18, 6 + 12 / 4), ("fp32", 16, 8 + 8 / 4)])
def test_state_is_that_of_megatrons_table(dtype, plain, distributed):
    """Bytes per parameter, from the guide to the distributed optimizer in Megatron-Core's documentation."""
    for shared, expected in ((False, plain), (True, distributed)):
        config = settings(dtype=DType(dtype), optimizer=OptimizerConfig(distributed=shared))
        memory = estimate_memory(SMALL, [], config, ParallelConfig(data=4))
        state = memory.student_weights + memory.gradients + memory.optimizer
        assert state == expected * rank_parameters(SMALL, ParallelConfig(), 0)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP32])
def test_state_is_what_a_model_in_training_has(dtype, distributed):
    config = settings(dtype=dtype, optimizer=OptimizerConfig(warmup_steps=0, distributed=distributed))
    expected = estimate_memory(SMALL, [], config, ParallelConfig())
    with parallel_context(ParallelConfig()) as ctx:
        model_chunks = build_model(SMALL, ctx, dtype)
        trained = setup_optimizer(model_chunks, config.optimizer, 2, dtype, ctx)
        trained.grad_norm(), trained.step()
        weights = list(model_chunks[0].parameters())
        assert _bytes(weights) == expected.student_weights
        assert _bytes([weight.main_grad for weight in weights]) == expected.gradients
        [adam] = [part.optimizer for part in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])]
        state = [value for of_one in adam.state.values() for name, value in of_one.items() if name != "step"]
        main = [weight for group in adam.param_groups for weight in group["params"] if dtype is not DType.FP32]
        assert _bytes(state) + _bytes(main) == expected.optimizer


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "switches",
    [
        {"qk_norm": True},
        {"activation": Activation.GELU},
        {"activation": Activation.SQUARED_RELU, "gated": False, "rotary_fraction": 0.5, "bias": True},
    ],
    ids=["SwiGLU, norms of queries and keys", "gated GELU", "squared ReLU"],
)
def test_activations_are_those_that_a_model_keeps(switches, recompute, monkeypatch):
    network, config = changed(SMALL, **switches), settings(256, micro_batch=2, global_batch=2, recompute=recompute)
    tokens = torch.zeros(2, 256, dtype=torch.long)
    batch = {"tokens": tokens, "position_ids": torch.arange(256).expand(2, -1)}
    kept, hooks = {}, torch.autograd.graph.saved_tensors_hooks

    def keep(saved):
        if isinstance(saved, torch.Tensor):
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    def counted(pack, unpack):
        return hooks(lambda tensor: keep(pack(tensor)), unpack)

    with parallel_context(ParallelConfig()) as ctx:
        [model] = build_model(network, ctx, config.dtype, recompute)
        # The local layers have hooks of their own, which torch asks instead of those around them.
        monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", counted)
        with hooks(keep, lambda tensor: tensor):
            output = forward_hidden(model.train(), batch)
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert output.requires_grad

    expected = estimate_memory(network, [], config, ParallelConfig()).activations
    if recompute:  # the layer that is run again in the backward pass is not there yet
        layer = network.sublayers[:2]
        expected -= sum(
            sublayer_activations(network, sublayer, 2, 256, ParallelConfig(), config.dtype) for sublayer in layer
        )
    else:
        # The CPU's layers make again what norms and gated activations return, and with SwiGLU the MLP's first product;
        # Transformer Engine's keep it. And their SwiGLU is one function, which keeps no factor of its product.
        mlp = network.sublayers[1]
        factors = mlp.gated * (4 if mlp.activation is Activation.SILU else 1)
        again = 2 * network.hidden_size + factors * mlp.ffn_hidden_size
        expected -= len(network.layers) * 2 * 256 * again * 2
    # Not counted are the tokens, the angles that cosines are of, and float32 copies of the norms' weights.
    assert expected == pytest.approx(measured, rel=0.025 if recompute else 0.005)


def test_the_loss_takes_what_it_took_on_an_h100():
    """The GPU's table in docs/benchmarks.md: bf16, 256 wide, chunks of 512 tokens; here with its sizes."""
    for vocab, gib in ((32768, 0.30), (131072, 1.13), (262144, 2.25)):
        narrow = SMALL.replace(hidden_size=256, vocab_size=vocab, padded_vocab_size=vocab)
        loss = estimate_memory(narrow, [narrow], settings(1024, micro_batch=1), ParallelConfig()).loss
        assert loss / GIB == pytest.approx(gib, rel=0.06)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [*Divergence, None])
def test_a_loss_takes_no_more_than_estimated(divergence, temperature):
    vocab, width, tokens, logits = 4096, 8, 64, LogitsConfig(divergence or Divergence.FORWARD_KL, temperature)
    kd_weight, lm_weight = (1.0, 0.0) if divergence else (0.0, 1.0)
    narrow = SMALL.replace(hidden_size=width, vocab_size=vocab, padded_vocab_size=vocab)
    run = settings(tokens, micro_batch=1, dtype=DType.FP32, loss=LossConfig(kd_weight, lm_weight, logits=logits))
    with parallel_context(ParallelConfig()) as ctx, _Peak() as peak:
        hidden, weight = torch.randn(tokens, width).requires_grad_(), torch.randn(vocab, width).requires_grad_()
        teacher = Predictions(torch.randn(tokens, width), torch.randn(vocab, width)) if divergence else None
        before = peak.now
        labels, mask = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens)
        group = ctx.collection.tp
        loss, _ = linear_distillation_loss(
            hidden, weight, labels, mask, group, vocab, teacher, kd_weight, lm_weight, tokens, logits
        )
        loss.backward()
    measured, expected = peak.most - before, estimate_memory(narrow, [narrow], run, ParallelConfig()).loss
    assert measured <= expected + 128 * tokens  # a few values per token


def test_a_teacher_costs_what_is_done_with_it():
    """Trained, it takes what it would as a student of the text; not looked at, it is not loaded."""
    run = settings(recompute=True, teacher_lr=1e-5)
    beside = estimate_memory(STUDENT, [TEACHER], run, ParallelConfig())
    alone = estimate_memory(TEACHER, [], run, ParallelConfig())
    assert beside.teacher_activations == alone.activations + alone.loss
    text = LossConfig(kd_logits_weight=0.0, lm_weight=1.0, logits=LogitsConfig(temperature=2.0))
    assert estimate_memory(STUDENT, [TEACHER], replace(run, loss=text), ParallelConfig()) == estimate_memory(
        STUDENT, [], replace(run, loss=text), ParallelConfig()
    )


def test_a_teachers_states_are_where_they_are_and_where_the_student_is_compared_with_them():
    """Eight layers of the first of four stages with eight of the last one, and the last hidden state for the logits."""
    loss = LossConfig(hidden=HiddenConfig(1.0, pairs=[[31 - n, n] for n in range(8)]))
    run = settings(128, global_batch=64, micro_batch=1, loss=loss)
    of_stages = [_stage_memory(STUDENT, [TEACHER], run, ParallelConfig(pipeline=4), n).teacher_states for n in range(4)]
    assert of_stages == [count * 64 * 128 * 4096 * 2 for count in (8, 0, 0, 9)]


def test_micro_batches_on_their_way_and_the_ends_of_a_pipeline():
    run = settings(8192, global_batch=64, micro_batch=1)
    four = estimate_memory(STUDENT, [TEACHER], run, ParallelConfig(pipeline=4))
    alone = estimate_memory(STUDENT, [TEACHER], run, ParallelConfig())
    assert four.stage == 0 and four.loss == four.teacher_states == 0
    assert four.activations == alone.activations + 3 * 8192 * 3072 * 2  # four times a quarter; and what is handed on
    assert alone.teacher_states == 64 * 8192 * 4096 * 2
    few = estimate_memory(STUDENT, [TEACHER], replace(run, global_batch=2), ParallelConfig(pipeline=4))
    assert few.activations == four.activations // 2
    interleaved = estimate_memory(STUDENT, [TEACHER], run, ParallelConfig(pipeline=4, virtual_pipeline=2))
    # 2205.05198, section 4.2.3: L(1 + (p - 1) / (p v)) layers of activations; and what twice as many chunks hand on.
    assert interleaved.activations == pytest.approx(alone.activations * (1 + 3 / 8), rel=0.02)


def test_a_step_of_a_dense_model_is_six_flops_per_parameter_and_token():
    run = settings(128, global_batch=64, micro_batch=1, steps=100)
    h100, layout = GPUS["h100"], ParallelConfig(data=8)
    step = estimate_step(TEACHER, [], run, layout, h100, utilization=0.5, price=2.0)
    flops = 6 * (num_parameters(TEACHER) - 128256 * 4096) * 64 * 128
    assert step.seconds == pytest.approx(flops / (8 * 989.4e12 * 0.5), rel=0.01)
    assert step.cost == 2 * step.gpu_hours == pytest.approx(2 * 8 * 100 * step.seconds / 3600)
    assert estimate_step(TEACHER, [], replace(run, recompute=True), layout, h100, 0.5).seconds == pytest.approx(
        step.seconds * 4 / 3
    )
    both = estimate_step(TEACHER, [TEACHER], run, ParallelConfig(pipeline=8), h100, 0.5)
    assert both.seconds == pytest.approx(step.seconds * 4 / 3 * (1 + 7 / 64))


def test_one_h100_is_too_small_for_the_papers_pair_and_the_nearest_layout_is_not():
    h100 = GPUS["h100"]
    assert not estimate_memory(STUDENT, [TEACHER], LLAMA_RUN, ParallelConfig()).fits(h100)
    changes, memory = nearest_layout(STUDENT, [TEACHER], LLAMA_RUN, ParallelConfig(), h100, gpus_per_node=8)
    assert memory.fits(h100)
    assert changes == {"recompute": True, "parallel.tensor": 2, "parallel.sequence": True}
    layout = ParallelConfig(tensor=2, sequence=True)
    assert not layout_problems(STUDENT, layout) + layout_problems(TEACHER, layout)
    changed = replace(LLAMA_RUN, recompute=True)
    assert estimate_memory(STUDENT, [TEACHER], changed, layout) == memory
    assert nearest_layout(STUDENT, [TEACHER], changed, layout, h100, gpus_per_node=8) == ({}, memory)


def test_the_nearest_layout_takes_one_change_before_two_and_ranks_from_replicas():
    h100, run = GPUS["h100"], settings(4096, global_batch=64, micro_batch=4)
    found = nearest_layout(STUDENT, [TEACHER], LLAMA_RUN, ParallelConfig(tensor=2, pipeline=4), h100, gpus_per_node=8)
    assert found[0] == {"recompute": True}
    replicas = replace(run, parallel=ParallelConfig(data=8))
    changes, _ = nearest_layout(STUDENT, [TEACHER], replicas, ParallelConfig(data=8), h100, gpus_per_node=8)
    assert changes == {"recompute": True, "optimizer.distributed": True}
    a100 = GPUS["a100-40gb"]
    changes, _ = nearest_layout(STUDENT, [TEACHER], replicas, ParallelConfig(data=8), a100, gpus_per_node=8)
    assert changes["parallel.tensor"] * changes["parallel.data"] == 8
    three = replace(run, parallel=ParallelConfig(data=3))
    changes, _ = nearest_layout(STUDENT, [TEACHER], three, ParallelConfig(data=3), GPUS["a100-40gb"], gpus_per_node=8)
    assert "parallel.tensor" in changes and "parallel.data" not in changes  # six GPUs or more for three replicas
    # Of three query groups, tensor parallelism of a power of two cannot take any.
    three = [changed(network, num_heads=24, num_query_groups=3) for network in (STUDENT, TEACHER)]
    changes, _ = nearest_layout(three[0], three[1:], run, ParallelConfig(), h100, gpus_per_node=8)
    assert "parallel.tensor" not in changes and changes["parallel.pipeline"] > 1
    assert (
        nearest_layout(STUDENT, [TEACHER.replace(hidden_size=2**20)], run, ParallelConfig(), h100, gpus_per_node=8)
        is None
    )


def docs_rows() -> list[str]:
    """The rows of the table in docs/clusters.md."""
    rows = []
    layouts = {
        "data 8, `recompute=true`": (ParallelConfig(data=8), True),
        "tensor 2, data 4, sequence": (ParallelConfig(tensor=2, data=4, sequence=True), False),
        "tensor 2, pipeline 2, data 2, sequence": (ParallelConfig(tensor=2, pipeline=2, data=2, sequence=True), False),
    }
    for name, (layout, recompute) in layouts.items():
        optimizer = OptimizerConfig(distributed=True)
        run = settings(8192, global_batch=128, micro_batch=1, recompute=recompute, optimizer=optimizer)
        memory = estimate_memory(STUDENT, [TEACHER], run, layout)
        terms = (
            memory.teacher_weights, memory.student_weights + memory.gradients, memory.optimizer, memory.activations,
            memory.loss, memory.teacher_states, memory.total,
        )  # fmt: skip
        seconds = estimate_step(STUDENT, [TEACHER], run, layout, GPUS["h100"]).seconds
        rows.append("| " + " | ".join([name, *(f"{term / GIB:.1f}" for term in terms), f"{seconds:.1f}"]) + " |")
    return rows


def test_the_table_in_the_documentation():
    text = (Path(__file__).parents[3] / "docs/clusters.md").read_text()
    assert [row for row in docs_rows() if row not in text] == []


def test_no_torch_is_needed():
    modules = ", ".join(
        f"minitron_megatron.{name}" for name in ("distillation.nearest_layout", "distillation.step_time", "fit_check")
    )
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'megatron'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Peak(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage):
        reference = torch.multiprocessing.reductions.StorageWeakRef(storage)
        self.alive.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        self.now = sum(size for _, size in self.alive.values())
        self.most = max(self.most, self.now)


def test_several_teachers_take_the_memory_of_those_that_teach_at_once():
    run = settings(128, global_batch=64, micro_batch=1)
    one, both = (
        estimate_memory(STUDENT, teachers, run, ParallelConfig()) for teachers in ([TEACHER], [TEACHER, STUDENT])
    )
    alone = estimate_memory(STUDENT, [STUDENT], run, ParallelConfig())
    assert both.teacher_weights == one.teacher_weights + alone.teacher_weights
    assert both.teacher_states == one.teacher_states + alone.teacher_states
    assert both.teacher_activations == one.teacher_activations > alone.teacher_activations  # they run in turn
    networks = {"large": TEACHER, "small": STUDENT}

    def at_once(*spans):
        teachers = [TeacherConfig(name, first_step=first, last_step=last) for name, first, last in spans]
        return _largest_at_once(teachers, networks)

    assert at_once(("small", 1, 5), ("large", 6, None)) == [TEACHER]
    assert at_once(("small", 1, 6), ("large", 6, None)) == [STUDENT, TEACHER]
    assert at_once() == []
