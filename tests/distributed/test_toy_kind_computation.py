"""What networks with the kind of `test_toy_kind.py` compute: the same in every layout, and as their own class does."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from minitron_megatron.cli import main
from minitron_megatron.model.network import Network
from tests.distributed.test_toy_kind import PLUGIN, data, make_toy, plugged, prepare
from tests.gradients import Gradients, close, local_gradients
from tests.ranks import run_on_ranks
from tests.tiny import Samples

pytestmark = pytest.mark.oldest

LAYOUTS = {"one": (1, 1, 1), "tensor": (2, 1, 1), "pipeline": (1, 2, 1)}


@pytest.fixture(scope="module", autouse=True)
def plugged_in() -> Iterator[None]:
    with plugged():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("toy"))


def _measure(layout: tuple[int, int, int], folder: Path, output: Path) -> None:
    """Logits of the network in a layout, written by the rank that knows them, and each rank's gradients of the pruned
    one in a step with the whole one as its teacher."""
    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.config.schema import DType, ParallelConfig
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.parallel.schedule import output_weight, run_forward

    tensor, pipeline, data = layout
    with parallel_context(ParallelConfig(tensor=tensor, pipeline=pipeline, data=data)) as ctx:
        models = {}
        for name in ("imported", "pruned"):
            checkpoint = Checkpoint(folder / name)
            models[name] = build_model(checkpoint.network, ctx, DType.FP32)
            load_weights(models[name], checkpoint, ctx)
        tokens = torch.randint(0, 63, (2, 16), generator=torch.Generator().manual_seed(5))
        batch = {"tokens": tokens, "position_ids": torch.arange(16).expand(2, -1), "loss_mask": torch.ones(2, 16)}
        hidden = run_forward(models["imported"], [batch], ctx, lambda output, _: output)
        if ctx.is_last_stage:
            logits = hidden[0] @ output_weight(models["imported"][-1]).T
            parts = [torch.empty_like(logits) for _ in range(tensor)]
            torch.distributed.all_gather(parts, logits.contiguous(), group=ctx.collection.tp)
            if ctx.tensor_rank == 0:
                torch.save(torch.cat(parts, dim=-1)[..., :64].transpose(0, 1), output / "logits")
        gradients = _gradients(models["pruned"], models["imported"], checkpoint.network, ctx)
        torch.save(gradients, output / f"gradients_{torch.distributed.get_rank()}")


def _gradients(student: list[nn.Module], teacher: list[nn.Module], network: Network, ctx) -> list[tuple]:
    """This rank's gradients of a step of two micro-batches and both losses."""
    from minitron_megatron.config.loss import LossConfig
    from minitron_megatron.config.schema import DType, OptimizerConfig
    from minitron_megatron.data.samples import rank_batches
    from minitron_megatron.distillation.entries import loss_entries
    from minitron_megatron.distillation.live_teacher import LiveTeacher
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.training.optimizer import setup_optimizer

    trained = setup_optimizer(student, OptimizerConfig(warmup_steps=1), 4, DType.FP32, ctx)
    trained.zero_grad()
    entries = loss_entries(LossConfig(lm_weight=0.5), LiveTeacher(teacher, ctx, network.vocab_size))
    step = DistillationStep(trained.model_chunks, entries, ctx, network.vocab_size)
    samples = Samples(4, 16, network.vocab_size)
    step.train(list(rank_batches(samples, 0, 4, 2, ctx.data_rank, ctx.layout.replicas)))
    return local_gradients([chunk.module for chunk in trained.model_chunks], network, ctx)


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory) -> dict[str, Path]:
    """What the ranks of every layout wrote."""
    found = {}
    for name, layout in LAYOUTS.items():
        found[name] = tmp_path_factory.mktemp(name)
        run_on_ranks(layout[0] * layout[1], _measure, layout, folder, found[name])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_its_own_class_in_every_layout(measured, layout):
    tokens = torch.randint(0, 63, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = make_toy()(tokens)
    torch.testing.assert_close(torch.load(measured[layout] / "logits"), expected, rtol=1e-4, atol=1e-5)


def test_every_gradient_is_equal_over_layouts(folder, measured):
    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.model.parameters import layer_key, parameters

    network = Checkpoint(folder / "pruned").network
    gradients = {}
    for name, (tensor, pipeline, _) in LAYOUTS.items():
        paths = [measured[name] / f"gradients_{rank}" for rank in range(tensor * pipeline)]
        gradients[name] = Gradients(network, [torch.load(path, weights_only=False) for path in paths])
    for param in parameters(network):
        index = [np.arange(size) for size in param.shape]
        expected = gradients["one"].read(param, index)
        assert expected.abs().max() > 0, layer_key(param)
        for name in ("tensor", "pipeline"):
            assert close(gradients[name].read(param, index), expected), (name, layer_key(param))


def _distill(layout: tuple[int, int, int], folder: Path, output: Path) -> None:
    tensor, pipeline, data_size = layout
    own = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.data={data_size}"]
    shutil.rmtree(output, ignore_errors=True)
    settings = ["steps=3", "global_batch=4", "micro_batch=2", "dtype=fp32", "teacher_dtype=fp32"]
    settings += ["loss.lm_weight=0.5", "optimizer.warmup_steps=1", "optimizer.lr=1e-3", "optimizer.min_lr=1e-4"]
    paths = [f"teacher={folder}/imported", f"student={folder}/pruned", f"output={output}"]
    assert main(["distill", f"plugins=[{PLUGIN}]", *paths, *settings, *own, *data(folder)]) == 0


def test_losses_and_gradient_norms_of_distillation_are_equal_over_layouts(folder, tmp_path):
    lines = {}
    for name, layout in LAYOUTS.items():
        run_on_ranks(layout[0] * layout[1], _distill, layout, folder, tmp_path / name)
        text = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines[name] = [json.loads(line) for line in text]
    for name in ("tensor", "pipeline"):
        for own, expected in zip(lines[name], lines["one"], strict=True):
            for key in ("loss/total", "loss/kd_logits", "loss/lm", "optim/grad_norm"):
                assert own[key] == pytest.approx(expected[key], rel=2e-6, abs=2e-7), (name, key)
    assert lines["one"][-1]["loss/kd_logits"] > 0


def test_generation_with_a_cache_is_that_of_whole_sequences(folder):
    """Greedy tokens are those that its own class gives, one whole sequence after another."""
    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.config.schema import DType, ParallelConfig
    from minitron_megatron.evaluation.inference import Inference
    from minitron_megatron.evaluation.sampling import SamplingParams
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context

    toy, prompts = make_toy(), [[1, 2, 3], [7, 5, 2, 9, 4]]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                tokens.append(int(toy(torch.tensor([tokens]))[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    with parallel_context(ParallelConfig()) as ctx:
        checkpoint = Checkpoint(folder / "imported")
        model_chunks = build_model(checkpoint.network, ctx, DType.FP32)
        load_weights(model_chunks, checkpoint, ctx)
        inference = Inference(model_chunks, ctx, checkpoint.network, None, [], batch=2)
        assert inference.generate(prompts, SamplingParams(8)) == expected
