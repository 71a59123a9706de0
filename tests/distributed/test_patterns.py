"""Networks whose sublayers come in another order than attention and MLP by turns."""

import json
import zlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from minitron_megatron.checkpoint.load import load_weights, local_parameters
from minitron_megatron.checkpoint.manifest import Manifest
from minitron_megatron.checkpoint.sharded import SHAPE, Checkpoint
from minitron_megatron.checkpoint.source import instances, take
from minitron_megatron.checkpoint.writer import write_checkpoint
from minitron_megatron.config.loss import HiddenConfig, HiddenLoss, LossConfig, Point, Projection
from minitron_megatron.config.schema import DType, OptimizerConfig, ParallelConfig
from minitron_megatron.data.samples import rank_batches
from minitron_megatron.model.axes import axis_sizes, parameters
from minitron_megatron.model.build import build_model
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.families import shape_from_config
from minitron_megatron.model.shape import ATTENTION, layers_pattern
from minitron_megatron.parallel.groups import process_groups
from tests.ranks import run_on_ranks
from tests.tiny import NETWORKS, Samples

pytest.importorskip("megatron.core.models.hybrid", reason="HybridModel comes with megatron-core 0.18")

LAYOUTS = {
    "1x1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "pp2_interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
}
# With pairs on the same stage and on different ones. The attention is compared at one of its layers, the MLP at three.
HIDDEN = HiddenConfig(
    0.5,
    loss=HiddenLoss.SQUAREHEAD,
    points=list(Point),
    pairs=[[1, 0], [4, 1], [5, 2], [6, 3]],
    projection=Projection.SHARED,
)
LOSS = LossConfig(kd_logits_weight=0.7, lm_weight=0.4, hidden=HIDDEN)
PATTERN = "*-*--*-"
WITH_ANOTHER = layers_pattern(4)  # the same sublayers, and an attention before the third MLP
ANOTHER = 2  # its number among the attentions
BATCHES = list(rank_batches(Samples(8, 16, 101), 0, 8, 2, 0, 1))


class RandomWeights:
    """Random weights by the name and the number of a sublayer, whatever the network around it."""

    dtype = torch.float32

    def __init__(self, shape):
        self.shape = shape

    def read(self, param, layer, index):
        name = param.parts[0].name
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {layer}".encode()))
        whole = torch.randn(param.size(axis_sizes(self.shape)), generator=generator)
        return take(0.1 * whole + ("norm" in name), index)


class WithAnotherAttention(RandomWeights):
    """The network of `PATTERN` with one attention more, which adds nothing."""

    def read(self, param, layer, index):
        if param.sublayer == ATTENTION and layer >= ANOTHER:
            if layer == ANOTHER:
                return torch.zeros([len(i) for i in index])
            layer -= 1
        return super().read(param, layer, index)


def every(shape):
    """What can be read of a network."""
    sizes = axis_sizes(shape)
    for param in parameters(shape):
        for layer in instances(param, shape):
            yield param, layer, [np.arange(n) for n in param.size(sizes)]


def write(folder, source):
    write_checkpoint(folder, source, torch.float32, Manifest("checkpoint"), None)


@pytest.fixture(scope="module", params=NETWORKS)
def folder(request, tmp_path_factory):
    """A folder with the checkpoint of a student and of a teacher that computes the same."""
    folder = tmp_path_factory.mktemp(request.param)
    shape = shape_from_config(NETWORKS[request.param])
    write(folder / "student", RandomWeights(shape.replace(pattern=PATTERN)))
    write(folder / "teacher", WithAnotherAttention(shape.replace(pattern=WITH_ANOTHER)))
    return folder


def test_a_checkpoint_holds_each_sublayer_under_its_place_in_the_pattern(folder):
    checkpoint = Checkpoint(folder / "student")
    assert checkpoint.tensors["decoder.layers.4.mlp.linear_fc2.weight"].shape == (48, 44)
    assert checkpoint.tensors["decoder.layers.5.self_attention.linear_proj.weight"].shape == (48, 72)
    assert checkpoint.shape.pattern == PATTERN
    expected = RandomWeights(checkpoint.shape)
    for where in every(checkpoint.shape):
        assert torch.equal(checkpoint.read(*where), expected.read(*where))
    attention = num_parameters(Checkpoint(folder / "teacher").shape) - num_parameters(checkpoint.shape)
    sizes = [torch.Size(p.size(axis_sizes(checkpoint.shape))).numel() for p in parameters(checkpoint.shape)]
    assert attention == sum(n for p, n in zip(parameters(checkpoint.shape), sizes) if p.sublayer == ATTENTION)


def test_megatron_loads_what_is_written_here(folder):
    from megatron.core import dist_checkpointing

    checkpoint = Checkpoint(folder / "student")
    with process_groups(ParallelConfig()) as groups:
        [model] = build_model(checkpoint.shape, groups, DType.FP32)
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint.folder))
        model.load_state_dict(state["model"], strict=True)
        for parameter, param, layer, index in local_parameters(model, checkpoint.shape, groups):
            assert torch.equal(parameter, checkpoint.read(param, layer, index))


def test_an_attention_that_adds_nothing_changes_nothing(folder):
    tokens = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(2))
    logits = []
    with process_groups(ParallelConfig()) as groups, torch.no_grad():
        for name in ("student", "teacher"):
            checkpoint = Checkpoint(folder / name)
            [model] = build_model(checkpoint.shape, groups, DType.FP32)
            load_weights([model], checkpoint, groups)
            logits.append(model(tokens, torch.arange(20).expand(3, -1), attention_mask=None))
    assert logits[0].std() > 0.3  # or the tolerance below would say little
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def work(folder, name):
    """A step of training in a layout, saved and loaded, by one of its ranks."""
    from minitron_megatron.training.state import RunState, load_state, save_state

    checkpoint = Checkpoint(folder / "student")
    with process_groups(LAYOUTS[name]) as groups:
        found = {}
        for attempt in ("first", "again"):
            pair, training = teacher_and_student(folder, checkpoint, LOSS, groups)
            if attempt == "first":
                result = pair.train(BATCHES)
                found["gradients"] = [
                    (param.name, layer, index, gradient)
                    for param, layer, index, gradient in gradients(training.chunks, checkpoint.shape, groups)
                ]
                values = (result.kd_logits, result.lm, *result.of_pairs.values())
                found["step"] = (*values, training.grad_norm(), training.step())
                save_state(folder / name, RunState(step=1), {"": training})
            else:
                assert load_state(folder / name, {"": training}).step == 1
            result = pair.evaluate(BATCHES)
            found[attempt] = (result.kd_logits, result.lm, *result.of_pairs.values())
        torch.save(found, folder / f"{name}_{dist.get_rank()}.pt")


def teacher_and_student(folder, student, loss, groups):
    """A student with the teacher of a folder, and the student's optimiser, its gradients at zero."""
    from minitron_megatron.distillation.hidden import HiddenLosses, add_projections
    from minitron_megatron.distillation.step import TeacherStudent
    from minitron_megatron.training.optimizer import optimization

    teacher = Checkpoint(folder / "teacher")
    teacher_chunks = build_model(teacher.shape, groups, DType.FP32)
    load_weights(teacher_chunks, Doubled(teacher), groups)  # so that the teacher is not the student
    chunks = build_model(student.shape, groups, DType.FP32, recompute=groups.layout.sequence)
    load_weights(chunks, student, groups)
    shapes = student.shape, teacher.shape
    add_projections(chunks, loss.hidden, *shapes, groups, seed=5)
    training = optimization(chunks, OptimizerConfig(lr=1e-3, warmup_steps=1), 4, DType.FP32, groups)
    training.zero_grad()
    hidden = HiddenLosses(loss.hidden, chunks, teacher_chunks, shapes, groups)
    return TeacherStudent(training.chunks, teacher_chunks, groups, loss, student.shape.vocab, hidden), training


def gradients(chunks, shape, groups):
    """This rank's part of the gradient of every parameter, and what it is a part of."""
    for chunk in unwrap_model(chunks):
        for parameter, param, layer, index in local_parameters(chunk, shape, groups):
            yield param, layer, index, parameter.main_grad.clone()


class Doubled:
    """A source whose embedding is twice as large."""

    def __init__(self, source):
        self.source, self.shape, self.dtype = source, source.shape, source.dtype

    def read(self, param, layer, index):
        return self.source.read(param, layer, index) * (2 if param.sublayer is None else 1)


@pytest.fixture(scope="module")
def single(folder):
    run_on_ranks(1, work, folder, "1x1")
    return torch.load(folder / "1x1_0.pt", weights_only=False)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "1x1"])
def test_a_step_does_not_depend_on_the_layout_and_is_saved(folder, single, name):
    num_ranks = LAYOUTS[name].tensor * LAYOUTS[name].pipeline
    run_on_ranks(num_ranks, work, folder, name)
    expected = {(key, layer): gradient for key, layer, _, gradient in single["gradients"]}
    missing = set(expected)
    for rank in range(num_ranks):
        found = torch.load(folder / f"{name}_{rank}.pt", weights_only=False)
        assert len(found["first"]) == 2 + 4 + 1 + 3 + 1  # two of predictions; at layers, attention, MLPs and embedding
        for what in ("step", "first"):
            np.testing.assert_allclose(found[what], single[what], rtol=1e-5)
        assert found["again"] == found["first"] != found["step"][:-2]
        for key, layer, index, gradient in found["gradients"]:
            whole = expected[key, layer]
            assert whole.abs().max() > 0, key
            torch.testing.assert_close(gradient, take(whole, index), rtol=0, atol=1e-5 * whole.abs().max().item())
            missing.discard((key, layer))
    assert not missing
    shape = Checkpoint(folder / "student").shape
    (folder / name / SHAPE).write_text(json.dumps(shape.to_dict()))
    assert Checkpoint(folder / name).iteration == 1  # and whole, or it would not open


# Layers of the network in `PATTERN`, and the same ones of the network with an attention more.
SAME_PAIRS = {
    "behind MLPs": ([Point.LAYER, Point.MLP], [[1, 0], [3, 2], [4, 1], [6, 3]], [[0, 0], [1, 2], [2, 1], [3, 3]]),
    "attentions": ([Point.ATTENTION], [[0, 1], [5, 2]], [[0, 1], [3, 2]]),
}


@pytest.mark.parametrize("case", SAME_PAIRS)
def test_hidden_losses_are_those_of_the_network_with_an_attention_that_adds_nothing(folder, case):
    points, *pairs = SAME_PAIRS[case]
    losses, found = [], []
    with process_groups(ParallelConfig()) as groups:
        for name, of_network in zip(("student", "teacher"), pairs, strict=True):
            hidden = HiddenConfig(0.5, loss=HiddenLoss.MSE, points=points, pairs=of_network)
            student = Checkpoint(folder / name)
            pair, training = teacher_and_student(folder, student, LossConfig(hidden=hidden), groups)
            losses.append(list(pair.train(BATCHES).of_pairs.values()))
            found.append({(p.parts[0].name, n): g for p, n, _, g in gradients(training.chunks, student.shape, groups)})
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert min(losses[0]) > 0
    own, other = found
    attentions = {p.parts[0].name for p in parameters(Checkpoint(folder / "student").shape) if p.sublayer == ATTENTION}
    for (name, number), gradient in own.items():
        twin = other[name, number + 1 if name in attentions and number >= ANOTHER else number]
        torch.testing.assert_close(gradient, twin, rtol=1e-4, atol=1e-5 * twin.abs().max().item())


def write_on(folder, name):
    """What a model writes after prompts of several lengths, in a layout."""
    from minitron_megatron.evaluation.decoding import Decoding
    from minitron_megatron.evaluation.inference import Inference

    checkpoint = Checkpoint(folder / "student")
    with process_groups(LAYOUTS[name]) as groups:
        chunks = build_model(checkpoint.shape, groups, DType.FP32)
        load_weights(chunks, checkpoint, groups)
        inference = Inference(chunks, groups, checkpoint.shape.vocab, None, [], batch=2)
        made = inference.generate(PROMPTS, Decoding(max_new_tokens=12))
        (folder / f"{name}_{dist.get_rank()}.json").write_text(json.dumps(made))


PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]


@pytest.mark.parametrize("name", ["1x1", "tp2", "tp2_pp2"])
def test_what_is_written_is_what_whole_sequences_predict(folder, name):
    num_ranks = LAYOUTS[name].tensor * LAYOUTS[name].pipeline
    run_on_ranks(num_ranks, write_on, folder, name)
    checkpoint = Checkpoint(folder / "student")
    with process_groups(ParallelConfig()) as groups, torch.no_grad():
        [model] = build_model(checkpoint.shape, groups, DType.FP32)
        load_weights([model], checkpoint, groups)
        expected = []
        for prompt in PROMPTS:
            tokens = torch.tensor([prompt])
            for _ in range(12):
                logits = model(tokens, torch.arange(tokens.size(1))[None], attention_mask=None)[0, -1]
                tokens = torch.cat([tokens, logits[: checkpoint.shape.vocab].argmax().view(1, 1)], dim=1)
            expected.append(tokens[0, len(prompt) :].tolist())
    assert len({token for made in expected for token in made}) > 2
    for rank in range(num_ranks):
        assert json.loads((folder / f"{name}_{rank}.json").read_text()) == expected
