"""Networks of unlike layers as Hugging Face folders, filled up with zeros: still the same function."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron_megatron.checkpoint import safetensors_writer
from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.padded import Padded, padded_network
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.schema import DType, ExportConfig, ExportFormat, ParallelConfig, PruneConfig
from minitron_megatron.errors import UnsupportedModelError
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import parameters
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.prune import prune
from tests.tiny import LLAMA, NETWORKS, hf_model, import_hf, unlike

# Twelve heads in four groups, so that three attentions can each keep another number of both.
SIZES = dict(num_attention_heads=12, num_key_value_heads=4, head_dim=8)
# Of each layer the groups, the heads in each group, and the neurons that stay; 0 for a sublayer that goes.
KEPT = [(4, 2, 30), (0, 0, 21), (3, 1, 0), (2, 3, 37)]
TOKENS = torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(0))


def plan_by_chance(network: Network, hidden: int) -> Plan:
    """What `KEPT` says and so many channels; which of each, chance decides."""
    generator = np.random.default_rng(3)

    def some(size: int, count: int) -> list[int]:
        return sorted(generator.choice(size, count, replace=False).tolist())

    plan = Plan(network, [], some(network.hidden_size, hidden), {})
    for layer, (groups, heads, ffn) in enumerate(KEPT):
        if groups:
            within = [some(3, heads) for _ in range(groups)]
            plan.elements[2 * layer] = {"groups": some(4, groups), "heads": within}
        if ffn:
            plan.elements[2 * layer + 1] = {"ffn": some(44, ffn)}
    plan.sublayers = sorted(plan.elements)
    return plan


@pytest.fixture(scope="module", params=NETWORKS)
def made(request, tmp_path_factory):
    """A model, and by number of channels the plan that cuts it and the folder with `pruned` and `exported`."""
    folder = tmp_path_factory.mktemp(request.param)
    model = hf_model(**NETWORKS[request.param] | SIZES)
    checkpoint = import_hf(folder, model)
    cut = {}
    for hidden in (48, 40):
        plan, own = plan_by_chance(Checkpoint(checkpoint).network, hidden), folder / str(hidden)
        own.mkdir()
        plan.write_file(own / "plan.json")
        prune(PruneConfig(str(checkpoint), str(own / "pruned"), plan=str(own / "plan.json")))
        export(ExportConfig(str(own / "pruned"), str(own / "exported"), format=ExportFormat.PADDED))
        cut[hidden] = plan, own
    return model, cut


def logits_of_folder(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())  # or transformers would have made weights up
    with torch.no_grad():
        return model(TOKENS).logits


def logits_of_ours(source):
    with parallel_context(ParallelConfig()) as ctx, torch.no_grad():
        [model] = build_model(source.network, ctx, DType.FP32)
        load_weights([model], source, ctx)
        return model(TOKENS, torch.arange(TOKENS.size(1)).expand_as(TOKENS), attention_mask=None)[..., :101]


@pytest.mark.parametrize("hidden", [48, 40])
def test_transformers_makes_of_it_what_the_unlike_network_is(made, hidden):
    plan, folder = made[1][hidden]
    checkpoint = Checkpoint(folder / "pruned")
    attentions = [checkpoint.network.sublayers[position] for position in checkpoint.network.positions(Attention)]
    mlps = [checkpoint.network.sublayers[position] for position in checkpoint.network.positions(MLP)]
    assert [(one.num_query_groups, one.heads_per_group) for one in attentions] == [(4, 2), (3, 1), (2, 3)]
    assert [one.ffn_hidden_size for one in mlps] == [30, 21, 37]
    assert (checkpoint.network, checkpoint.network.pattern) == (plan.target, "*--**-")
    expected = logits_of_ours(checkpoint)
    assert expected.std() > 0.3  # or the tolerance below would say little
    torch.testing.assert_close(logits_of_folder(folder / "exported"), expected, rtol=1e-5, atol=1e-5)


def test_transformers_makes_of_it_what_it_makes_of_the_original_without_what_went(made):
    """With the columns of their output matrices zero, heads and neurons add nothing, whatever they are."""
    original, cut = made
    plan, folder = cut[48]
    model = AutoModelForCausalLM.from_config(original.config)
    model.load_state_dict(original.state_dict())
    whole = logits_of_model(model)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            columns = torch.zeros(4, 3, 8)
            of_attention = plan.elements.get(2 * number, {"groups": [], "heads": []})
            for group, heads in zip(of_attention["groups"], of_attention["heads"], strict=True):
                columns[group, heads] = 1
            layer.self_attn.o_proj.weight *= columns.flatten()
            columns = torch.zeros(44)
            columns[plan.elements.get(2 * number + 1, {"ffn": []})["ffn"]] = 1
            layer.mlp.down_proj.weight *= columns
    expected = logits_of_model(model)
    assert (expected - whole).abs().max() > 0.3
    torch.testing.assert_close(logits_of_folder(folder / "exported"), expected, rtol=1e-5, atol=1e-5)


def logits_of_model(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_its_config_has_the_largest_size_of_each(made):
    for hidden, (_, folder) in made[1].items():
        config = json.loads((folder / "exported/config.json").read_text())
        found = [config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "head_dim")]
        assert found == [4, hidden, 37, 8]
        assert (config["num_key_value_heads"], config["num_attention_heads"]) == (4, 12)


def test_as_it_is_it_is_refused_and_the_sizes_are_named(made, tmp_path):
    _, folder = made[1][48]
    with pytest.raises(UnsupportedModelError) as raised:
        export(ExportConfig(str(folder / "pruned"), str(tmp_path / "out")))
    assert str(raised.value) == (
        "no class of transformers has layers of unlike sizes, and attention.num_heads is 8, 3, 6 by layer; "
        "attention.num_query_groups is 4, 3, 2 by layer; layers 1 have no attention; mlp.ffn_hidden_size is 30, 21, "
        "37 by layer; layers 2 have no MLP: make these alike, or export with format=padded, which fills layers up with "
        "zeros"
    )
    assert not list(tmp_path.iterdir())


def test_a_network_whose_layers_are_alike_is_written_as_it_is(tmp_path):
    checkpoint = str(import_hf(tmp_path, hf_model(**LLAMA)))
    folders = [
        export(ExportConfig(checkpoint, str(tmp_path / f"as_{form.value}"), format=form)) for form in ExportFormat
    ]
    contents = [[(folder / name).read_bytes() for name in ("model.safetensors", "config.json")] for folder in folders]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_any_positions_are_read(config):
    """As exports read it, whose blocks of rows end anywhere, and as writers of shards do."""
    source = Padded(RandomWeights(unlike(network_from_config(config)), seed=1))
    generator = np.random.default_rng(0)
    for param in parameters(source.network):
        whole = source.read(param, [np.arange(n) for n in param.shape])
        assert whole.shape == param.shape
        for share in (0.1, 0.5, 0.9):
            index = [np.sort(generator.choice(n, max(1, int(n * share)), replace=False)) for n in param.shape]
            expected = whole[tuple(torch.from_numpy(i) for i in np.ix_(*index))]
            assert torch.equal(source.read(param, index), expected), (param.name, param.layer)


def test_shards_and_blocks_cut_it_anywhere(made, tmp_path, monkeypatch):
    _, folder = made[1][40]
    monkeypatch.setattr(safetensors_writer, "BLOCK_BYTES", 1000)
    settings = ExportConfig(str(folder / "pruned"), str(tmp_path / "out"), 2e-5, format=ExportFormat.PADDED)
    assert torch.equal(logits_of_folder(export(settings)), logits_of_folder(folder / "exported"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_what_zeros_cannot_fill_up_is_named():
    network = network_from_config(LLAMA)
    other = dataclasses.replace(network.sublayers[2], head_dim=10)
    sublayers = (*network.sublayers[:2], other, *network.sublayers[3:])
    with pytest.raises(UnsupportedModelError, match="attention sublayers differ in more than group, head, and zeros"):
        padded_network(network.replace(sublayers=sublayers))
