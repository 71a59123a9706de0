"""Checkpoints go between this package and plain Megatron-Core, on one and two tensor-parallel ranks.

What is plain here is made of Megatron-Core's own classes and defaults alone, as any Megatron training run is.
"""

import copy
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.convert import import_checkpoint
from minitron_megatron.checkpoint.dist_reader import NETWORK, TRACKER, Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.schema import DType, ImportConfig, ParallelConfig, PruneConfig, ScoreConfig, TargetConfig
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.parameters import layer_key, parameters
from minitron_megatron.parallel.context import current_context, parallel_context
from minitron_megatron.pruning.prune import prune
from minitron_megatron.pruning.score_model import score_model
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, Samples, hf_model, import_hf, without_sublayers
from tests.unit.checkpoint.plain import logits_of, plain_config, plain_model

pytestmark = pytest.mark.oldest

NETWORK_OF_RUN = network_from_config(LLAMA)
FORMS = {"stacked": {}, "by layer": {"non_homogeneous_layers": True}}
STEP = 7


def train_and_save(folder, tensor: int) -> dict:
    """A step of a plain training run in bf16, saved in both forms; returns this rank's weights."""
    torch.manual_seed(3)
    model = plain_model(tensor, torch.bfloat16)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, bf16=True, params_dtype=torch.bfloat16)
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=True)
    tokens = torch.arange(24).view(2, 12)
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
    wrapped(tokens, torch.arange(12).expand(2, -1), future, labels=tokens).mean().backward()
    wrapped.finish_grad_sync()
    optimizer.step()
    for form, metadata in FORMS.items():
        root = folder / form
        state = {"model": model.sharded_state_dict(metadata=metadata), "iteration": STEP}
        state["optimizer"] = optimizer.sharded_state_dict(copy.copy(state["model"]))
        if dist.get_rank() == 0:
            (root / f"iter_{STEP:07d}").mkdir(parents=True)
            (root / TRACKER).write_text(str(STEP))
            (root / NETWORK).write_text(json.dumps(NETWORK_OF_RUN.to_dict()))
        dist.barrier()
        dist_checkpointing.save(state, str(root / f"iter_{STEP:07d}"))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def load_and_run(imported, tensor: int) -> torch.Tensor:
    """What a plain model that loads the package's checkpoint, with default strictness, makes of some tokens."""
    model = plain_model(tensor, torch.float32)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(imported / "release"))
    model.load_state_dict(state["model"], strict=True)
    return logits_of(model, torch.arange(60).view(2, 30))


def work(folder, tensor: int) -> None:
    with parallel_context(ParallelConfig(tensor=tensor)):
        weights = train_and_save(folder / f"tp{tensor}", tensor)
        logits = load_and_run(folder / "checkpoint", tensor)
        # Written by the ranks of a world that is there already, together.
        shared = import_checkpoint(ImportConfig(str(folder / "hf"), str(folder / f"shared{tensor}")))
        assert torch.equal(load_and_run(shared, tensor), logits)
        torch.save((weights, logits), folder / f"tp{tensor}_rank{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `work` made: the folder, and `weights, logits` of every rank by number of ranks."""
    folder = tmp_path_factory.mktemp("megatron")
    import_hf(folder, hf_model(**LLAMA))
    work(folder, 1)
    run_on_ranks(2, work, folder, 2)
    return folder, {n: [torch.load(folder / f"tp{n}_rank{r}.pt") for r in range(n)] for n in (1, 2)}


@pytest.mark.parametrize("tensor", [1, 2])
def test_plain_megatron_loads_what_is_written_here(made, tensor):
    _, ranks = made
    logits = torch.cat([logits for _, logits in ranks[tensor]], dim=-1)
    with torch.no_grad():
        expected = hf_model(**LLAMA)(torch.arange(60).view(2, 30)).logits
    torch.testing.assert_close(logits[..., :101], expected, rtol=1e-4, atol=1e-4)


def whole(name: str, shards: list[torch.Tensor]) -> torch.Tensor:
    """One tensor out of those of the tensor-parallel ranks, as Megatron-Core's layers split them."""
    if "norm" in name:
        assert all(torch.equal(shard, shards[0]) for shard in shards)
        return shards[0]
    if "linear_proj" in name or "linear_fc2" in name:
        return torch.cat(shards, dim=1)
    if "linear_fc1" in name:  # every rank has its gate rows, then its up rows
        return torch.cat([half for i in (0, 1) for half in (shard.chunk(2)[i] for shard in shards)])
    return torch.cat(shards)


NORMS = {  # the local spec's modules, and the checkpoint keys that they share with Transformer Engine's
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_what_plain_megatron_saved_is_read(made, form, tensor):
    """With its optimiser's state beside the weights. Every tensor is the model's own, whole and in parts."""
    folder, ranks = made
    checkpoint = Checkpoint(folder / f"tp{tensor}/{form}")
    assert (checkpoint.iteration, checkpoint.dtype, checkpoint.network) == (STEP, torch.bfloat16, NETWORK_OF_RUN)
    assert any(key.startswith("optimizer.") for key in checkpoint.tensors)
    assert ("decoder.layers.2.mlp.linear_fc2.weight" in checkpoint.tensors) == (form == "by layer")
    generator, count = np.random.default_rng(0), 0
    for param in parameters(NETWORK_OF_RUN):
        name = layer_key(param).replace(param.name, NORMS.get(param.name, param.name))
        expected = whole(name, [weights[name] for weights, _ in ranks[tensor]])
        assert torch.equal(checkpoint.read(param, [np.arange(n) for n in param.shape]), expected), name
        # Positions on both sides of every boundary between ranks.
        index = [np.sort(generator.choice(n, n * 2 // 3, replace=False)) for n in param.shape]
        some = expected[tuple(torch.from_numpy(i) for i in np.ix_(*index))]
        assert torch.equal(checkpoint.read(param, index), some), name
        count += 1
    assert count == len(ranks[tensor][0][0])


@pytest.mark.parametrize("form", FORMS)
def test_what_plain_megatron_saved_is_scored_and_pruned(made, form, tmp_path):
    folder, _ = made
    checkpoint = Checkpoint(folder / f"tp2/{form}")
    with parallel_context(ParallelConfig()) as ctx:
        chunks = build_model(checkpoint.network, ctx, DType.FP32)
        load_weights(chunks, checkpoint, ctx)
        settings = ScoreConfig(num_samples=4, micro_batch=2)
        scores = score_model(chunks, checkpoint.network, ctx, Samples(4, 16, 101), settings)
    (tmp_path / "scores").mkdir()
    scores.write(tmp_path / "scores")
    Manifest("scores").write(tmp_path / "scores")
    target = TargetConfig(layers=3, hidden=40, ffn=30, heads=4)
    prune(PruneConfig(str(checkpoint.root), str(tmp_path / "pruned"), str(tmp_path / "scores"), target=target))
    pruned = Checkpoint(tmp_path / "pruned")
    assert pruned.dtype is torch.bfloat16 and not any(key.startswith("optimizer.") for key in pruned.tensors)
    sizes = {name: size for name, size, *_ in hf_tensors(pruned.network)}
    assert sizes["model.layers.2.mlp.down_proj.weight"] == [40, 30]
    for _, _, param, part in hf_tensors(pruned.network):
        assert read_hf_tensor(pruned, param, part).isfinite().all()


# Of the four layers the third has lost its attention, and the last its MLP.
LOST = (4, 7)


@pytest.fixture
def plain_hybrid(monkeypatch):
    """What is left without `LOST` as Megatron-Core's HybridModel, whose layers are sublayers."""
    hybrid_block = pytest.importorskip("megatron.core.models.hybrid.hybrid_block", reason="0.18 and newer have it")
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer

    # It takes Transformer Engine for its final norm, whether that is there or not.
    monkeypatch.setattr(hybrid_block, "TENorm", WrappedTorchNorm)
    both = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    attention, mlp = (
        TransformerLayerSubmodules(
            **{name: getattr(both, name) for name in names},
            sharded_state_dict_keys_map=both.sharded_state_dict_keys_map,
        )
        for names in (("input_layernorm", "self_attention", "self_attn_bda"), ("pre_mlp_layernorm", "mlp", "mlp_bda"))
    )
    layers = hybrid_block.HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    with parallel_context(ParallelConfig()):
        yield HybridModel(
            config=plain_config(1, torch.float32, num_layers=6, is_hybrid_model=True),
            hybrid_stack_spec=ModuleSpec(module=hybrid_block.HybridStack, submodules=layers),
            vocab_size=128,
            max_sequence_length=64,
            hybrid_layer_pattern="*-*--*",
            position_embedding_type="rope",
            rotary_base=500,
        )


def test_what_a_hybrid_model_of_plain_megatron_saved_is_read(plain_hybrid, tmp_path):
    """As earlier versions wrote networks that have lost sublayers, too; now they are numbered as GPTModel's are."""
    root, network = tmp_path / "c", without_sublayers(NETWORK_OF_RUN, *LOST)
    folder = root / f"iter_{STEP:07d}"
    folder.mkdir(parents=True)
    (root / TRACKER).write_text(str(STEP))
    (root / NETWORK).write_text(json.dumps(network.to_dict()))
    with torch.no_grad():
        for parameter in plain_hybrid.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    dist_checkpointing.save({"model": plain_hybrid.sharded_state_dict(), "iteration": STEP}, str(folder))
    checkpoint = Checkpoint(root)
    assert {"decoder.layers.4.mlp.linear_fc2.weight", "decoder.final_norm.weight"} < checkpoint.tensors.keys()
    assert checkpoint.network == network and checkpoint.network.pattern == "*-*--*"
    theirs, count = dict(plain_hybrid.named_parameters()), 0
    for param in parameters(network):
        name = param.name.replace("final_layernorm", "final_norm")
        if param.position is not None:
            name = f"decoder.layers.{param.position}.{NORMS.get(param.name, param.name)}"
        found = checkpoint.read(param, [np.arange(n) for n in param.shape])
        assert torch.equal(found, theirs[name]), name
        count += 1
    assert count == len(theirs)

    write_checkpoint(tmp_path / "again", checkpoint, torch.float32, Manifest("checkpoint"), None)
    tokens = torch.arange(60).view(2, 30)
    expected = logits_of(plain_hybrid, tokens)
    assert expected.std() > 0.3  # or the tolerance below would say little
    for source in (checkpoint, Checkpoint(tmp_path / "again")):
        ctx = current_context()
        [model] = build_model(network, ctx, DType.FP32)
        load_weights([model], source, ctx)
        assert isinstance(model, GPTModel)
        with torch.no_grad():
            logits = model(tokens, torch.arange(30).expand_as(tokens), None)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert "decoder.layers.2.mlp.linear_fc2.weight" in source.tensors and not source._is_hybrid
