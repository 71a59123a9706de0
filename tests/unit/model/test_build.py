"""Models built here against transformers' models of the same weights."""

import dataclasses
import weakref

import megatron.core
import pytest
import torch

from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.common import DType
from minitron_megatron.config.parallel import Builder, ParallelConfig
from minitron_megatron.model import build, torch_modules
from minitron_megatron.model.build import build_model, build_problems
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.network import layout_problems
from minitron_megatron.parallel.context import parallel_context
from tests.in_memory import StateDict
from tests.tiny import LLAMA, hf_model, unlike
from tests.unit.model.configs import CONFIGS

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_transformers(config):
    theirs = hf_model(**config)
    network = network_from_config(theirs.config.to_dict())
    # Longer than the 16 positions up to which llama3's rotary scaling would hardly show.
    tokens = torch.randint(0, network.vocab_size, (2, 48), generator=torch.Generator().manual_seed(2))
    with parallel_context(ParallelConfig()) as ctx, torch.no_grad():
        [ours] = build_model(network, ctx, DType.FP32)
        load_weights([ours], StateDict(network, theirs.state_dict()), ctx)
        logits = ours(tokens, torch.arange(48).expand(2, -1), attention_mask=None)
        assert not logits[..., network.vocab_size :].any()  # the rows that pad the vocabulary
        expected = theirs(tokens).logits
    assert expected.std() > 0.3  # or the tolerance below would say little
    torch.testing.assert_close(logits[..., : network.vocab_size], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_norms_and_gated_mlps_make_is_made_again_and_not_kept(recompute, monkeypatch):
    network = network_from_config(LLAMA)
    tokens = torch.randint(0, network.vocab_size, (2, 8), generator=torch.Generator().manual_seed(2))
    with parallel_context(ParallelConfig()) as ctx:
        [model] = build_model(network, ctx, DType.FP32, recompute)
        load_weights([model], StateDict(network, hf_model(**LLAMA).state_dict()), ctx)
        passing, products = [], []
        for name, module in model.named_modules():
            if name.endswith(("linear_qkv", "linear_fc1", "linear_fc2")):
                module.register_forward_pre_hook(lambda module, args: passing.append(weakref.ref(args[0])))
            if name.endswith("linear_fc1"):
                module.register_forward_hook(lambda module, args, outputs: passing.append(weakref.ref(outputs[0])))
        product = torch_modules.ColumnParallelLinear.forward

        def counted(*args, **kwargs):
            products.append(args[0])
            return product(*args, **kwargs)

        monkeypatch.setattr(torch_modules.ColumnParallelLinear, "forward", counted)

        def run() -> list[torch.Tensor]:
            model.zero_grad()
            output = model(tokens, torch.arange(8).expand(2, -1), attention_mask=None)
            alive.append(sum(one() is not None for one in passing))
            output.square().sum().backward()
            return [parameter.grad.clone() for parameter in model.parameters()]

        alive = []
        found = run()
        assert len(passing) == 4 * len(network.layers) * (1 + recompute)
        # Queries, keys and values, and an MLP's first product; this one, or both with the layer, once more.
        assert len(products) == (4 if recompute else 3) * len(network.layers) + 1
        monkeypatch.setattr(torch_modules, "recomputed", lambda function, *args: function(*args))
        expected = run()
    assert alive[0] == 0
    assert recompute or alive[1] == 4 * len(network.layers)
    assert all(map(torch.equal, found, expected))


def test_a_layout_that_does_not_fit_the_network_lists_every_problem():
    network = network_from_config({**LLAMA, "intermediate_size": 45, "num_hidden_layers": 3})
    assert build_problems(network, ParallelConfig(tensor=3, pipeline=2, virtual_pipeline=2)) == [
        "network.attention.num_query_groups = 2 does not divide by parallel.tensor = 3: choose a tensor size that "
        "divides it, or that it divides",
        "network.padded_vocab_size = 128 does not divide by parallel.tensor = 3: choose a tensor size that divides it",
        "network has 3 layers, too few for the 4 stages of parallel.pipeline x virtual_pipeline = 2 x 2: "
        "lower one of the two",
    ]


@pytest.mark.parametrize(
    "num_heads, head_dim, tensor, problem",
    [
        (8, 12, 4, None),
        (8, 3, 4, None),
        (
            6,
            12,
            4,
            "network.attention.num_heads = 6 does not divide by parallel.tensor = 4: choose a tensor size that divides "
            "it",
        ),
        (
            16,
            3,
            8,
            "network.attention.num_query_groups = 2, each with 30 rows of queries, key and value, cannot be shared "
            "evenly by parallel.tensor = 8: choose a smaller tensor size",
        ),
    ],
)
def test_several_tensor_ranks_share_a_query_group_where_they_can(num_heads, head_dim, tensor, problem):
    network = network_from_config(
        {**LLAMA, "num_attention_heads": num_heads, "head_dim": head_dim, "intermediate_size": 48}
    )
    assert layout_problems(network, ParallelConfig(tensor=tensor)) == ([problem] if problem else [])


def test_sizes_of_one_layer_that_the_layout_cannot_split_name_the_layer():
    network = unlike(network_from_config(LLAMA))
    assert build_problems(network, ParallelConfig(tensor=4, pipeline=5), "target") == [
        "target.layer 0.attention.num_heads = 6 does not divide by parallel.tensor = 4: choose a tensor size that "
        "divides it",
        "target.layer 2.attention.num_heads = 2 does not divide by parallel.tensor = 4: choose a tensor size that "
        "divides it",
        "target has 4 layers, too few for the 5 stages of parallel.pipeline x virtual_pipeline = 5 x 1: lower one of "
        "the two",
    ]


def test_a_builder_that_this_megatron_core_does_not_have_is_said_with_the_release_that_has_it(monkeypatch):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setattr(megatron.core, "__version__", "0.16.1")
    network = network_from_config(LLAMA)
    assert not build_problems(unlike(network), ParallelConfig())  # which GPTModel builds
    mixed = network.replace(sublayers=(network.sublayers[0], dataclasses.replace(network.sublayers[1], bias=True)))
    missing = "megatron-core 0.16.1 has none: install megatron-core 0.18 or newer, with Python 3.12"
    assert build_problems(mixed, ParallelConfig()) == [
        f"network: layer 0 has sublayers of unlike add_bias_linear, which takes HybridModel, and {missing}"
    ]
    assert build_problems(network, ParallelConfig(builder=Builder.HYBRID)) == [
        f"parallel.builder = hybrid, and {missing}"
    ]
