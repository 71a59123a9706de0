"""Models built here against transformers' models of the same weights."""

import weakref

import megatron.core
import pytest
import torch

from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.schema import DType, ParallelConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.model import build, local
from minitron_megatron.model.build import build_model, transformer_config
from minitron_megatron.model.families import shape_from_config
from minitron_megatron.model.shape import layout_problems
from minitron_megatron.parallel.groups import process_groups
from minitron_megatron.parallel.layout import Layout
from tests.in_memory import StateDict
from tests.tiny import LLAMA, hf_model
from tests.unit.model.configs import CONFIGS


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_transformers(config):
    theirs = hf_model(**config)
    shape = shape_from_config(theirs.config.to_dict())
    # Longer than the 16 positions up to which llama3's rotary scaling would hardly show.
    tokens = torch.randint(0, shape.vocab, (2, 48), generator=torch.Generator().manual_seed(2))
    with process_groups(ParallelConfig()) as groups, torch.no_grad():
        [ours] = build_model(shape, groups, DType.FP32)
        load_weights([ours], StateDict(shape, theirs.state_dict()), groups)
        logits = ours(tokens, torch.arange(48).expand(2, -1), attention_mask=None)
        assert not logits[..., shape.vocab :].any()  # the rows that pad the vocabulary
        expected = theirs(tokens).logits
    assert expected.std() > 0.3  # or the tolerance below would say little
    torch.testing.assert_close(logits[..., : shape.vocab], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_norms_and_gated_mlps_make_is_made_again_and_not_kept(recompute, monkeypatch):
    shape = shape_from_config(LLAMA)
    tokens = torch.randint(0, shape.vocab, (2, 8), generator=torch.Generator().manual_seed(2))
    with process_groups(ParallelConfig()) as groups:
        [model] = build_model(shape, groups, DType.FP32, recompute)
        load_weights([model], StateDict(shape, hf_model(**LLAMA).state_dict()), groups)
        passing, products = [], []
        for name, module in model.named_modules():
            if name.endswith(("linear_qkv", "linear_fc1", "linear_fc2")):
                module.register_forward_pre_hook(lambda module, args: passing.append(weakref.ref(args[0])))
            if name.endswith("linear_fc1"):
                module.register_forward_hook(lambda module, args, outputs: passing.append(weakref.ref(outputs[0])))
        product = local.ColumnParallelLinear.forward

        def counted(*args, **kwargs):
            products.append(args[0])
            return product(*args, **kwargs)

        monkeypatch.setattr(local.ColumnParallelLinear, "forward", counted)

        def run() -> list[torch.Tensor]:
            model.zero_grad()
            output = model(tokens, torch.arange(8).expand(2, -1), attention_mask=None)
            alive.append(sum(one() is not None for one in passing))
            output.square().sum().backward()
            return [parameter.grad.clone() for parameter in model.parameters()]

        alive = []
        found = run()
        assert len(passing) == 4 * shape.num_layers * (1 + recompute)
        # Queries, keys and values, and an MLP's first product; this one, or both with the layer, once more.
        assert len(products) == (4 if recompute else 3) * shape.num_layers + 1
        monkeypatch.setattr(local, "recomputed", lambda function, *args: function(*args))
        expected = run()
    assert alive[0] == 0
    assert recompute or alive[1] == 4 * shape.num_layers
    assert all(map(torch.equal, found, expected))


def test_a_layout_that_does_not_fit_the_network_lists_every_problem():
    shape = shape_from_config({**LLAMA, "intermediate_size": 45, "num_hidden_layers": 3})
    with pytest.raises(ConfigError) as raised:
        transformer_config(shape, Layout(tensor=3, pipeline=2, virtual_pipeline=2), DType.FP32, recompute=False)
    assert raised.value.problems == [
        "shape.num_query_groups = 2 does not divide by parallel.tensor = 3: choose a tensor size that divides it, or "
        "that it divides",
        "shape.padded_vocab = 128 does not divide by parallel.tensor = 3: choose a tensor size that divides it",
        "shape has 3 layers, too few for the 4 stages of parallel.pipeline x virtual_pipeline = 2 x 2: "
        "lower one of the two",
    ]


@pytest.mark.parametrize(
    "num_heads, head_dim, tensor, problem",
    [
        (8, 12, 4, None),
        (8, 3, 4, None),
        (6, 12, 4, "shape.num_heads = 6 does not divide by parallel.tensor = 4: choose a tensor size that divides it"),
        (
            16,
            3,
            8,
            "shape.num_query_groups = 2, each with 30 rows of queries, key and value, cannot be shared evenly by "
            "parallel.tensor = 8: choose a smaller tensor size",
        ),
    ],
)
def test_several_tensor_ranks_share_a_query_group_where_they_can(num_heads, head_dim, tensor, problem):
    shape = shape_from_config(
        {**LLAMA, "num_attention_heads": num_heads, "head_dim": head_dim, "intermediate_size": 48}
    )
    assert layout_problems(shape, Layout(tensor=tensor)) == ([problem] if problem else [])


def test_a_pattern_that_is_no_plain_transformer_needs_a_newer_megatron_core(monkeypatch):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setattr(megatron.core, "__version__", "0.16.1")
    shape = shape_from_config(LLAMA).replace(pattern="*-*--*-")
    with pytest.raises(ConfigError) as raised:
        transformer_config(shape, Layout(pipeline=8), DType.FP32, recompute=False)
    assert raised.value.problems == [
        "shape has 7 layers, too few for the 8 stages of parallel.pipeline x virtual_pipeline = 8 x 1: "
        "lower one of the two",
        "shape.pattern = '*-*--*-' is not '*-' repeated, which takes HybridModel, and megatron-core 0.16.1 has none: "
        "install 0.18 or newer, which needs Python 3.12",
    ]
