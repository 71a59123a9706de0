"""Every family, split over ranks, against transformers: logits, and every gradient of the plain loss."""

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor
from minitron_megatron.config.schema import DType, OptimizerConfig, ParallelConfig
from minitron_megatron.data.samples import rank_batches
from minitron_megatron.model.families import network_from_config
from tests.gradients import Gradients, local_gradients
from tests.in_memory import StateDict
from tests.ranks import run_on_ranks
from tests.tiny import FAMILIES, Samples, hf_model

LAYOUTS = {"tp2": ParallelConfig(tensor=2), "pp2": ParallelConfig(pipeline=2)}
SEQUENCE, BATCH = 20, 4


def batch_of(config: dict) -> dict:
    return next(rank_batches(Samples(BATCH, SEQUENCE, config["vocab_size"]), 0, BATCH, BATCH, 0, 1))


def work(folder, name):
    """Logits and gradients of all families, by one rank of a layout."""
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.distillation.objectives import CrossEntropy, Entry
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.parallel.schedule import output_weight, run_forward
    from minitron_megatron.training.optimizer import setup_optimizer

    found = {}
    with parallel_context(LAYOUTS[name]) as ctx:
        for family, config in FAMILIES.items():
            model, batch = hf_model(**config), batch_of(config)
            network = network_from_config(config)
            model_chunks = build_model(network, ctx, DType.FP32)
            load_weights(model_chunks, StateDict(network, model.state_dict()), ctx)
            hidden = run_forward(model_chunks, [batch], ctx, lambda hidden, _: hidden)
            logits = [(last @ output_weight(model_chunks[-1]).T).transpose(0, 1) for last in hidden]
            trained = setup_optimizer(model_chunks, OptimizerConfig(warmup_steps=1), 4, DType.FP32, ctx)
            trained.zero_grad()
            DistillationStep(trained.model_chunks, [Entry(None, CrossEntropy())], ctx, network.vocab_size).train(
                [batch]
            )
            found[family] = logits, local_gradients(model_chunks, network, ctx)
        torch.save(found, folder / f"{dist.get_rank()}.pt")


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run_on_ranks(2, work, folder, request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(ranks, family):
    model, batch = hf_model(**FAMILIES[family]), batch_of(FAMILIES[family])
    network = network_from_config(FAMILIES[family])
    logits = model(batch["tokens"]).logits
    found = torch.cat([of_rank[family][0][0] for of_rank in ranks if of_rank[family][0]], dim=-1)
    assert logits.std() > 0.3  # or the tolerance below would say little
    torch.testing.assert_close(found[..., : network.vocab_size], logits, rtol=1e-4, atol=1e-4)

    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    ((losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = Gradients(network, [of_rank[family][1] for of_rank in ranks])
    for name, _, param, part in hf_tensors(network):
        # That a bias of all keys changes no attention is exact on paper alone.
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
        difference = read_hf_tensor(gradients, param, part) - expected[name]
        assert scale > 0 and difference.abs().max() <= 1e-4 * scale, name
