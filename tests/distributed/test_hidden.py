"""Losses between hidden states: the same in every layout, and what autograd makes of them on transformers models."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.loss import (
    Balance,
    HiddenConfig,
    HiddenLoss,
    LayerMap,
    LossConfig,
    Projection,
    all_points,
)
from minitron_megatron.config.schema import DType, OptimizerConfig, ParallelConfig
from minitron_megatron.data.samples import rank_batches
from minitron_megatron.distillation.entries import loss_entries
from minitron_megatron.distillation.hidden import HiddenDistance
from minitron_megatron.distillation.live_teacher import LiveTeacher
from minitron_megatron.distillation.losses import forward_kl
from minitron_megatron.distillation.pairs import hidden_problems, resolve_pairs
from minitron_megatron.distillation.projections import add_projections
from minitron_megatron.distillation.step import DistillationStep
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.parameters import PROJECTIONS
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.training.optimizer import setup_optimizer
from tests.gradients import Gradients, close, local_gradients
from tests.in_memory import StateDict
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, Samples, changed, hf_model, without_sublayers

LAYOUTS = {
    "1x1": ParallelConfig(),
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True),
    "tp4_sequence": ParallelConfig(tensor=4, sequence=True),  # two ranks share a query group
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "pp4": ParallelConfig(pipeline=4),  # where only some stages have states to send
    "tp2_pp2_dp2": ParallelConfig(tensor=2, pipeline=2, data=2, sequence=True),
    "pp2_interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
}
# The teacher is wider and deeper: its layers lie on other stages than those of the student.
TEACHER = {**LLAMA, "num_hidden_layers": 6, "hidden_size": 56, "num_attention_heads": 8}
# Its output weight is its embedding, whose copies on the first and the last stage have gradients of their own.
STUDENT = {**LLAMA, "num_attention_heads": 8, "tie_word_embeddings": True}
NARROW = {**TEACHER, "hidden_size": 48}
CASES = {
    "cosine, shared": HiddenConfig(0.8, projection=Projection.SHARED),
    "mse, per pair": HiddenConfig(
        0.3,
        loss=HiddenLoss.MSE,
        map=LayerMap.END_ALIGNED,
        projection=Projection.PER_PAIR,
        points=["layer", "mlp"],
    ),
    "squarehead, everywhere": HiddenConfig(
        0.5, loss=HiddenLoss.SQUAREHEAD, points=all_points(), pairs=[[0, 5], [3, 0], [2, 2], [1, 5]]
    ),
    "infonce, shared": HiddenConfig(
        0.2, loss=HiddenLoss.INFONCE, projection=Projection.SHARED, points=["layer", "mlp"]
    ),
    "cosine, dynamic": HiddenConfig(1.0, Balance.DYNAMIC, pairs=[[1, 4], [3, 5]]),
}
GLOBAL_BATCH, MICRO_BATCH, SEQUENCE, STEPS = 4, 1, 16, 2
CONTRASTED = 2  # sequences of a micro-batch over all replicas, in which infonce finds its negatives


def models(name):
    """Teacher and student, as transformers models; of one width where there is no projection."""
    teacher = TEACHER if CASES[name].projection is not Projection.NONE else NARROW
    return hf_model(seed=1, **teacher), hf_model(seed=2, **STUDENT)


def source_of(model):
    return StateDict(network_from_config(model.config.to_dict()), model.state_dict())


def samples():
    return Samples(16, SEQUENCE, 101, seed=3)


def work(folder, name):
    """Steps of every case in a layout, by one of its ranks. Some layouts run layers again in the backward pass."""
    found = {}
    with parallel_context(LAYOUTS[name]) as ctx:
        for case, hidden in CASES.items():
            teacher, student = map(source_of, models(case))
            loss = LossConfig(0.7, 0.4, chunk_tokens=7, hidden=hidden)
            teacher_chunks = build_model(teacher.network, ctx, DType.FP32)
            load_weights(teacher_chunks, teacher, ctx)
            model_chunks = build_model(
                student.network, ctx, DType.FP32, recompute="interleaved" in name or "dp2" in name
            )
            load_weights(model_chunks, student, ctx)
            networks = student.network, teacher.network
            add_projections(model_chunks, hidden, *networks, ctx, seed=5)
            distance = HiddenDistance(hidden, model_chunks, networks, ctx)
            trained = setup_optimizer(model_chunks, OptimizerConfig(lr=1e-3, warmup_steps=1), 4, DType.FP32, ctx)
            vocab = student.network.vocab_size
            entries = loss_entries(loss, LiveTeacher(teacher_chunks, ctx, vocab), distance)
            step = DistillationStep(trained.model_chunks, entries, ctx, vocab, loss.chunk_tokens)
            own = found[case] = {"steps": []}
            for number in range(STEPS):
                replicas, is_contrast = ctx.layout.replicas, hidden.loss is HiddenLoss.INFONCE
                size = CONTRASTED // replicas if is_contrast else MICRO_BATCH
                batches = rank_batches(samples(), number * GLOBAL_BATCH, GLOBAL_BATCH, size, ctx.data_rank, replicas)
                trained.zero_grad()
                result = step.train(list(batches))
                if number == 0:
                    own["gradients"] = local_gradients(model_chunks, student.network, ctx)
                    own["projections"] = {
                        name: (projection.weight.detach().clone(), projection.weight.main_grad.clone())
                        for chunk in model_chunks
                        for name, projection in getattr(chunk, PROJECTIONS, {}).items()
                    }
                losses, of_pairs = result.losses, result.entries["kd_hidden"].pair_losses
                values = (losses["kd_logits"], losses["lm"], result.alpha, *of_pairs.values())
                own["steps"].append((*values, result.total, trained.grad_norm(), trained.step()))
        torch.save(found, folder / f"{name}_{dist.get_rank()}.pt")


class Run:
    """What one layout found."""

    def __init__(self, folder, name):
        layout = LAYOUTS[name]
        num_ranks = layout.tensor * layout.pipeline * layout.replicas
        run_on_ranks(num_ranks, work, folder, name)
        self.ranks = [torch.load(folder / f"{name}_{rank}.pt", weights_only=False) for rank in range(num_ranks)]

    def gradients(self, case):
        network = network_from_config(hf_model(**STUDENT).config.to_dict())
        return Gradients(network, [rank[case]["gradients"] for rank in self.ranks])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(scope="module")
def single(folder):
    return Run(folder, "1x1")


@pytest.fixture(scope="module", params=[name for name in LAYOUTS if name != "1x1"])
def many(request, folder):
    return Run(folder, request.param)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_do_not_depend_on_the_layout(case, single, many):
    for rank in many.ranks:
        np.testing.assert_allclose(rank[case]["steps"], single.ranks[0][case]["steps"], rtol=1e-5)
    expected, found = single.gradients(case), many.gradients(case)
    for name, _, param, part in hf_tensors(expected.network):
        assert close(read_hf_tensor(found, param, part), read_hf_tensor(expected, param, part)), name
    projections = single.ranks[0][case]["projections"]
    assert {name for rank in many.ranks for name in rank[case]["projections"]} == set(projections)
    for rank in many.ranks:
        for name, (weight, gradient) in rank[case]["projections"].items():
            assert torch.equal(weight, projections[name][0])
            assert close(gradient, projections[name][1]), name


def network(count):
    return changed(network_from_config({**STUDENT, "model_type": "llama"}), num_layers=count)


def states_of(model, tokens):
    """Logits, and the hidden states by point and layer."""
    seen, hooks = {}, []

    def keep(module, *place):
        def hook(module, args, output):
            seen[place] = output[0] if isinstance(output, tuple) else output

        hooks.append(module.register_forward_hook(hook))

    keep(model.model.embed_tokens, "embedding", 0)
    for number, layer in enumerate(model.model.layers):
        keep(layer, "layer", number)
        keep(layer.self_attn, "attention", number)
        keep(layer.mlp, "mlp", number)
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def contrast(state, other, mask):
    """InfoNCE over the tokens of a micro-batch that count, summed."""
    own, theirs = (F.normalize(x[mask > 0], dim=-1) for x in (state, other))
    return F.cross_entropy(own @ theirs.T / 0.07, torch.arange(len(own)), reduction="sum")


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_plain_loss_on_transformers_models(case, single):
    config, found = CASES[case], single.ranks[0][case]
    teacher, student = models(case)
    batch = next(rank_batches(samples(), 0, GLOBAL_BATCH, GLOBAL_BATCH, 0, 1))
    mask = batch["loss_mask"]
    with torch.no_grad():
        target, theirs = states_of(teacher, batch["tokens"])
    logits, ours = states_of(student, batch["tokens"])

    def mean(x):
        return (x * mask).sum() / mask.sum()

    projections = {name: weight.clone().requires_grad_() for name, (weight, _) in found["projections"].items()}
    distances = []
    for pair in resolve_pairs(config, network(4), network(6)):
        state, other = ours[pair.point, pair.student], theirs[pair.point, pair.teacher]
        if projections:
            state = state @ projections.get(pair.name, projections.get("shared")).T
        if config.loss is HiddenLoss.INFONCE:
            batches = zip(*(x.split(CONTRASTED) for x in (state, other, mask)), strict=True)
            distances.append(sum(contrast(*one) for one in batches) / mask.sum())
        elif config.loss is HiddenLoss.COSINE:
            distances.append(mean(1 - F.cosine_similarity(state, other, dim=-1)))
        else:
            distances.append(mean((state - other).square().mean(-1)))
        if config.loss is HiddenLoss.SQUAREHEAD:
            distances[-1] = distances[-1] / mean(other.square().mean(-1))
    kd = mean(forward_kl(logits.log_softmax(-1), target.log_softmax(-1)))
    lm = mean(F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none"))
    of_states = sum(distances) / len(distances)
    alpha = (kd / of_states).item() if config.balance is Balance.DYNAMIC else 1.0
    loss = 0.7 * kd + 0.4 * lm + config.weight * alpha * of_states
    loss.backward()
    expected = [value.item() for value in (kd, lm, torch.tensor(alpha), *distances, loss)]
    np.testing.assert_allclose(found["steps"][0][: len(expected)], expected, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    own = single.gradients(case)
    for name, _, param, part in hf_tensors(own.network):
        assert close(read_hf_tensor(own, param, part), gradients[name], 1e-4), name
    for name, (_, gradient) in found["projections"].items():
        assert close(gradient, projections[name].grad, 1e-4), name
    # The second step is weighted by what the first one found.
    if config.balance is Balance.DYNAMIC:
        assert found["steps"][1][2] == pytest.approx(alpha, rel=1e-5)


# A shared projection that is larger than the rest of the network: the replicas' parts of it differ between the stages
# unless it is kept apart.
SHARING = {
    "layers of both stages": HiddenConfig(1.0, loss=HiddenLoss.MSE, projection=Projection.SHARED),
    "a layer of one stage": HiddenConfig(
        1.0, loss=HiddenLoss.MSE, projection=Projection.SHARED, pairs=[[2, 1]], points=["layer", "mlp"]
    ),
}
OPTIMIZERS = [dict(distributed=d, overlap=o) for d in (False, True) for o in (False, True)]


def train_a_shared_projection(folder, name, layout):
    """The projection on this rank, and its gradients' norms, after steps with every kind of optimiser."""
    found = {}
    teacher, student = source_of(hf_model(seed=1, **{**LLAMA, "hidden_size": 1032})), source_of(hf_model(**LLAMA))
    networks = student.network, teacher.network
    with parallel_context(layout) as ctx:
        for (case, hidden), settings in itertools.product(SHARING.items(), OPTIMIZERS):
            teacher_chunks = build_model(teacher.network, ctx, DType.FP32)
            load_weights(teacher_chunks, teacher, ctx)
            model_chunks = build_model(student.network, ctx, DType.FP32)
            load_weights(model_chunks, student, ctx)
            add_projections(model_chunks, hidden, *networks, ctx, seed=5)
            distance = HiddenDistance(hidden, model_chunks, networks, ctx)
            config = OptimizerConfig(lr=1e-2, warmup_steps=1, eps=1e-3, **settings)
            trained = setup_optimizer(model_chunks, config, 9, DType.FP32, ctx)
            vocab = student.network.vocab_size
            entries = loss_entries(LossConfig(hidden=hidden), LiveTeacher(teacher_chunks, ctx, vocab), distance)
            step = DistillationStep(trained.model_chunks, entries, ctx, vocab)
            norms = []
            for number in range(3):
                batches = rank_batches(samples(), 4 * number, 4, MICRO_BATCH, ctx.data_rank, ctx.layout.replicas)
                trained.zero_grad()
                step.train(list(batches))
                norms.append(trained.grad_norm())
                trained.step()
            own = [p.weight.detach().clone() for c in model_chunks for p in getattr(c, PROJECTIONS, {}).values()]
            found[(case, *settings.values())] = own, norms
        torch.save(found, folder / f"{name}_{dist.get_rank()}.pt")


@pytest.mark.parametrize("virtual_pipeline", [None, 2])
def test_copies_of_a_shared_projection_learn_from_all_stages_and_replicas(virtual_pipeline, tmp_path):
    run_on_ranks(1, train_a_shared_projection, tmp_path, "single", ParallelConfig())
    layout = ParallelConfig(pipeline=2, data=2, virtual_pipeline=virtual_pipeline)
    run_on_ranks(4, train_a_shared_projection, tmp_path, "many", layout)
    single = torch.load(tmp_path / "single_0.pt")
    many = [torch.load(tmp_path / f"many_{rank}.pt") for rank in range(4)]
    for key, ([expected], norms) in single.items():
        copies = [copy for rank in many for copy in rank[key][0]]
        assert len(copies) == (4 if key[0] == "layers of both stages" else 2)
        for copy in copies:
            assert torch.equal(copy, copies[0]), key
            torch.testing.assert_close(copy, expected, rtol=1e-4, atol=1e-5)
        for rank in many:
            np.testing.assert_allclose(rank[key][1], norms, rtol=1e-4)


def test_maps_of_layers():
    def places(student, teacher, **settings):
        pairs = resolve_pairs(HiddenConfig(1.0, **settings), network(student), network(teacher))
        return [(pair.student, pair.teacher) for pair in pairs]

    assert places(4, 8) == [(0, 1), (1, 3), (2, 5), (3, 7)]
    assert places(3, 8) == [(0, 2), (1, 4), (2, 7)]
    assert places(2, 2) == [(0, 0), (1, 1)]
    end = dict(map=LayerMap.END_ALIGNED)
    assert places(3, 8, **end) == [(0, 5), (1, 6), (2, 7)]
    assert places(4, 2, **end) == [(2, 0), (3, 1)]
    assert places(4, 8, pairs=[[3, 0]]) == [(3, 0)]
    every = resolve_pairs(HiddenConfig(1.0, points=["embedding", "mlp"], pairs=[[1, 2]]), network(4), network(8))
    assert [pair.name for pair in every] == ["embedding", "mlp_1_2"]
    halves = without_sublayers(network(1), 1), network(3)
    of_halves = resolve_pairs(HiddenConfig(1.0, points=all_points(), pairs=[[0, 1]]), *halves)
    assert [pair.name for pair in of_halves] == ["layer_0_1", "attention_0_1", "embedding"]


def test_what_cannot_be_compared_is_named():
    student = network(4)
    teacher = changed(student, hidden_size=60, num_layers=6)
    found = hidden_problems(HiddenConfig(1.0, pairs=[[0, 6], [4, 5]]), student, teacher)
    assert found == [
        "loss.hidden.pairs has [0, 6], and the teacher has layers 0 to 5: name one of these",
        "loss.hidden.pairs has [4, 5], and the student has layers 0 to 3: name one of these",
        "loss.hidden.projection = none, and student.hidden_size = 48 is not teacher.hidden_size = 60: set "
        "loss.hidden.projection to shared or per_pair",
    ]
    assert hidden_problems(HiddenConfig(0.0, pairs=[[9, 9]]), student, teacher) == []
    [problem] = HiddenConfig(1.0, points=["layer", "norm"]).problems()
    assert problem.startswith("loss.hidden.points has 'norm': must be one of layer, attention, mlp")


def test_a_layer_without_its_mlp_is_compared_in_what_it_has():
    teacher, student = network(4), without_sublayers(network(4), 5)
    assert hidden_problems(HiddenConfig(1.0), student, teacher) == []
    pairs = resolve_pairs(HiddenConfig(1.0, points=["layer", "mlp"]), student, teacher)
    assert [pair.name for pair in pairs] == [f"layer_{n}_{n}" for n in range(4)] + ["mlp_0_0", "mlp_1_1", "mlp_3_3"]
    assert hidden_problems(HiddenConfig(1.0, pairs=[[1, 2], [2, 2], [7, 4]], points=["mlp"]), student, teacher) == [
        "loss.hidden.pairs has [2, 2]: the student's layer has the points layer, attention, the teacher's layer, "
        "attention, mlp, and loss.hidden.points = mlp is not in both; name other layers, or add the point layer",
        "loss.hidden.pairs has [7, 4], and the student has layers 0 to 3: name one of these",
        "loss.hidden.pairs has [7, 4], and the teacher has layers 0 to 3: name one of these",
    ]
