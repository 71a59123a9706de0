"""Shapes and Hugging Face configs, both ways."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from minitron_megatron.errors import ConfigError, UnsupportedModelError
from minitron_megatron.model.families import config_from_network, network_from_config
from minitron_megatron.model.network import Llama3RopeScaling, Network
from tests.tiny import FAMILIES, LLAMA, NEMOTRON, NETWORKS, QWEN2, changed, unlike
from tests.unit.model.configs import CONFIGS, LLAMA3_ROPE


def in_transformers(config):
    """What transformers takes a config for, defaults filled in."""
    values = dict(config)
    return AutoConfig.for_model(values.pop("model_type"), **values).to_dict()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shapes_survive_plain_values_and_a_hugging_face_config(config):
    network = network_from_config(in_transformers(config))
    assert Network.from_dict(json.loads(json.dumps(network.to_dict()))) == network
    written = config_from_network(network, config)
    # Once as the file says it, once as transformers reads it.
    assert network_from_config(written) == network
    assert network_from_config(in_transformers(written)) == network


def test_a_config_says_what_the_shape_says():
    network = network_from_config(CONFIGS["llama3 rope"])
    assert network.rotary_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 16)
    attention, mlp = network.sublayers[:2]
    sizes = network.rotary_base, network.hidden_size, mlp.ffn_hidden_size, attention.head_dim
    assert sizes == (5e3, 48, 44, 12)
    assert (len(network.layers), attention.heads_per_group) == (4, 3)
    assert (network.vocab_size, network.padded_vocab_size) == (101, 128)
    network = network_from_config(NEMOTRON)
    switches = network.rotary_fraction, network.norm_zero_centered, network.tie_embeddings
    assert (*switches, network.sublayers[1].gated) == (0.5, True, True, False)


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_theta=7.0),
        dict(rope_theta=7.0, rope_scaling={"type": "llama3", **LLAMA3_ROPE}),
        dict(rope_theta=7.0, rope_scaling=None, num_key_value_heads=None),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 5.0}, rope_theta=7.0),
        dict(model_type="mistral", num_attention_heads=16, num_key_value_heads=...),
        dict(model_type="qwen2", sliding_window=32),
        dict(model_type="qwen3", sliding_window=32, num_attention_heads=32, num_key_value_heads=...),
        dict(model_type="seed_oss", num_attention_heads=16, num_key_value_heads=...),
        dict(model_type="nemotron", norm_eps=1e-5),
        dict(model_type="nemotron", norm_eps=1e-5, partial_rotary_factor=0.25),
        dict(
            model_type="nemotron",
            norm_eps=1e-5,
            partial_rotary_factor=0.25,
            rope_parameters={"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.75},
        ),
    ],
    ids=str,
)
def test_older_and_shorter_configs_mean_what_they_mean_to_transformers(changes):
    config = {k: v for k, v in LLAMA.items() if k not in ("rope_parameters", "head_dim")} | changes
    config = {k: v for k, v in config.items() if v is not ...}
    assert network_from_config(config) == network_from_config(in_transformers(config))


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", dict(sliding_window=8, layer_types=["sliding_attention"] * 7, norm_eps=1.0, kv_channels=3)),
        ("llama", dict(is_llama_config=True, rope_interleaved=False, **{"transformers.js_config": {"dtype": "q4"}})),
        ("llama", dict(temperature=0.6, top_p=0.9, fim_token_id=3, pretraining_tp=2, embedding_multiplier=1.0)),
        ("llama", dict(final_logit_softcapping=None, whatever=None, is_causal=True, no_rope_layers=[])),
        ("mistral", dict(attention_bias=True, layer_types=["full_attention"] * 4, use_sliding_window=True)),
        ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=4, use_mrope=False)),
        ("qwen2", dict(use_sliding_window=True, sliding_window=8, layer_types=["full_attention"] * 4)),
        ("qwen3", dict(use_sliding_window=True, sliding_window=64, layer_types=["sliding_attention"] * 4)),
        ("seed_oss", dict(sliding_window=8, attention_dropout=0.1)),
        ("nemotron", dict(sliding_window=8, rms_norm_eps=3.0, kv_channels=128)),
    ],
    ids=str,
)
def test_what_transformers_passes_over_is_passed_over(family, changes):
    assert network_from_config({**FAMILIES[family], **changes}) == network_from_config(FAMILIES[family])


def test_dropout_is_said_to_act_in_training_only(caplog):
    network_from_config({**LLAMA, "attention_dropout": 0.1, "resid_pdrop": 0.0})
    assert "attention_dropout = 0.1 acts in transformers' training only" in caplog.text
    assert "resid_pdrop" not in caplog.text


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text("abc_", min_size=1, max_size=8), st.integers(2, 9) | st.just("x"), min_size=1))
def test_no_field_that_nobody_knows_is_passed_over(fields):
    fields = {f"zz_{name}": value for name, value in fields.items()}
    with pytest.raises(UnsupportedModelError) as raised:
        network_from_config({**LLAMA, **fields})
    assert all(name in str(raised.value) for name in fields)


STALE = dict(
    layer_types=["full_attention"] * 4,
    max_window_layers=28,
    use_sliding_window=False,
    auto_map={"AutoModelForCausalLM": "modeling_custom.Custom"},
    quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    num_labels=3,
    pruned_heads={},
    no_rope_layers=[],
    kv_channels=12,
    task_specific_params={"x": 1},
    bos_token_id=1,
    eos_token_id=[2, 3],
    attention_dropout=0.0,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_holds_is_written(family):
    source = {**FAMILIES[family], **STALE}
    network = changed(network_from_config(source), num_layers=2, hidden_size=36)
    written = config_from_network(network, source)
    assert network_from_config(in_transformers(written)) == network
    gone = {"auto_map", "quantization_config", "max_window_layers", "num_labels", "kv_channels", "task_specific_params"}
    assert not gone & written.keys()
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, [2, 3])
    assert len(written.get("layer_types", [0, 0])) == 2


def test_families_that_are_the_same_network_have_the_same_shape():
    networks = {
        family: network_from_config(config).replace(tie_embeddings=False) for family, config in FAMILIES.items()
    }
    assert networks["mistral"] == networks["llama"] and networks["seed_oss"] == networks["qwen2"]
    assert len({repr(network) for network in networks.values()}) == len(NETWORKS)


def test_a_llama_whose_width_is_no_multiple_of_the_heads_is_written_as_mistral():
    network = network_from_config(LLAMA).replace(hidden_size=46)
    written = config_from_network(network, LLAMA)
    assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert network_from_config(in_transformers(written)) == network


def test_a_qwen2_whose_width_is_not_that_of_its_heads_is_written_as_seed_oss():
    """The one's servers divide the width by the heads; what the other's config assumes is not what this one's does."""
    whole = {**QWEN2, "head_dim": 8, "sliding_window": None, "layer_types": ["full_attention"] * 4}
    network = network_from_config(whole)
    assert config_from_network(network, whole)["model_type"] == "qwen2"
    network = changed(network, num_layers=3, hidden_size=46)
    written = config_from_network(network, whole)
    assert (written["model_type"], written["architectures"]) == ("seed_oss", ["SeedOssForCausalLM"])
    read = in_transformers(written)
    assert network_from_config(read) == network
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout")
    assert {name: read[name] for name in special} == {name: in_transformers(whole)[name] for name in special}
    assert read["residual_dropout"] == 0


@pytest.mark.parametrize(
    "changes, named",
    [
        (
            dict(model_type="gpt2"),
            "'gpt2' is not supported: choose a model of one of llama, mistral, nemotron, qwen2, qwen3, seed_oss",
        ),
        (dict(model_type="mixtral", num_local_experts=8), "'mixtral' is not supported (it has layers of mixtures of"),
        (
            dict(model_type="jamba", num_experts=16, mamba_d_state=16),
            "(it has layers of mixtures of experts ('E') and of Mamba ('M'))",
        ),
        (dict(model_type="deepseek_v3", n_routed_experts=256, kv_lora_rank=512), "multi-latent attention"),
        (dict(model_type="qwen3_next", num_experts=512, linear_num_value_heads=32), "gated linear attention ('G')"),
        (dict(model_type="gemma3_text"), "'gemma3_text' is not supported (GPTModel of Megatron-Core has neither"),
        (
            dict(model_type="qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=3),
            "sliding_window = 32 is not supported",
        ),
        (
            dict(
                model_type="qwen3",
                use_sliding_window=True,
                sliding_window=32,
                layer_types=["full_attention"] * 3 + ["sliding_attention"],
            ),
            "import with max_positions=32",
        ),
        (
            dict(model_type="qwen2", layer_types=["full_attention"] * 3),
            "layer_types names 3 layers, and num_hidden_layers",
        ),
        (dict(model_type="qwen2", layer_types=["chunked_attention"] * 4), "layer_types has chunked_attention"),
        (dict(model_type="qwen2", layer_types=["sliding_attention"] * 4), "without a sliding_window in use"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported for this family"),
        (dict(rope_parameters={"rope_theta": 1.0, "partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5 is not"),
        (
            dict(rope_scaling={"type": "llama3", **LLAMA3_ROPE}),
            "differ: keep the one that the model was trained with",
        ),
        (dict(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "has parameters by kind of layer"),
        (dict(attention_multiplier=0.0156), "attention_multiplier = 0.0156 may change the network, and a llama model"),
        (dict(logits_scaling=8, residual_multiplier=0.22), "logits_scaling = 8, residual_multiplier = 0.22 may change"),
        (dict(embedding_multiplier=12.0), "embedding_multiplier = 12.0 may change the network"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping = 30.0 may change the network"),
        (dict(query_pre_attn_scalar=144), "query_pre_attn_scalar = 144 may change the network"),
        (dict(no_rope_layers=[1, 1, 1, 0]), "no_rope_layers = [1, 1, 1, 0] may change the network"),
        (dict(per_layer_config=[{"intermediate_size": 8}]), "per_layer_config"),
        (dict(rope_interleaved=True), "rope_interleaved = true may change the network"),
        (dict(is_causal=False), "is_causal = false may change the network"),
        (dict(rope_freq_base=5.0), "take it out of config.json if the model is the same without, or choose another"),
        (dict(model_type=None), "model_type = None"),
        (dict(attention_bias=True), "attention_bias = true is not supported for this family: choose a model without"),
        (dict(mlp_bias=True), "mlp_bias = true is not supported for this family: choose a model without"),
        (
            dict(model_type="seed_oss", attention_out_bias=True),
            "attention_out_bias = true is not supported for this family: choose a model without",
        ),
        (
            dict(model_type="seed_oss", attention_bias=False),
            "attention_bias = false is not supported for this family: choose a model with",
        ),
        (
            dict(model_type="mistral", sliding_window=32),
            "sliding_window = 32 is not supported, being shorter than max_position_embeddings = 64: ",
        ),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu' is not supported for this family: choose a model with 'silu'"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rotary scaling 'yarn'"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rotary scaling 'linear'"),
        (dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}), "rotary scaling 'dynamic'"),
    ],
    ids=str,
)
def test_what_has_no_axis_table_is_refused_by_name(changes, named):
    with pytest.raises(UnsupportedModelError) as raised:
        network_from_config({**LLAMA, **changes})
    assert named in str(raised.value)


def test_a_window_that_no_sequence_fills_is_no_window():
    config = {**LLAMA, "model_type": "mistral", "sliding_window": LLAMA["max_position_embeddings"]}
    assert network_from_config(config) == network_from_config({**config, "sliding_window": None})


def test_a_network_that_cannot_be_lists_every_problem():
    values = network_from_config(LLAMA).to_dict()
    with pytest.raises(ConfigError) as raised:
        Network.from_dict({**values, "hidden_size": 0, "padded_vocab_size": 100, "rotary_fraction": 0.0})
    named = ("network.hidden_size = 0", "network.padded_vocab_size = 100", "network.rotary_fraction = 0.0")
    assert all(name in problem for name, problem in zip(named, raised.value.problems, strict=True))
    with pytest.raises(ConfigError, match="num_heads = 6 is not a multiple of attention.num_query_groups = 4"):
        Network.from_dict({**values, "attention": {**values["attention"], "num_query_groups": 4}})
    with pytest.raises(ConfigError) as raised:
        Network.from_dict({**values, "pattern": "*E"})
    assert raised.value.problems == [
        "network.pattern has sublayers ['E']: the known ones are '*' (attention), '-' (MLP)"
    ]


def test_what_is_no_network_names_the_field_and_what_it_may_be():
    values = network_from_config(LLAMA).to_dict()
    wrong = {"widht": 3, "norm": "batchnorm", "rotary_scaling": {"factor": 8.0, "kind": "yarn"}}
    with pytest.raises(ConfigError) as raised:
        Network.from_dict({**values, **wrong})
    found = raised.value.problems
    assert found[0].startswith("network.widht is no field: the fields are pattern, hidden_size, vocab_size, ")
    assert found[-5:-3] == [
        "network.norm = 'batchnorm': must be one of rmsnorm, layernorm",
        "network.rotary_scaling.kind is no field: the fields are factor, low_freq_factor, high_freq_factor, "
        "original_max_positions",
    ]
    assert [problem.split(" ")[0] for problem in found[-3:]] == [
        f"network.rotary_scaling.{name}" for name in ("low_freq_factor", "high_freq_factor", "original_max_positions")
    ]
    with pytest.raises(ConfigError) as raised:
        Network.from_dict({**values, "mlp": {"activation": "relu"}})
    assert raised.value.problems == [
        "network.mlp.ffn_hidden_size is missing: give it a value",
        "network.mlp.activation = 'relu': must be one of silu, gelu, squared_relu",
    ]
    with pytest.raises(ConfigError, match="network.mlp is missing: give the sizes of the MLP sublayers"):
        Network.from_dict({name: value for name, value in values.items() if name != "mlp"})
    with pytest.raises(ConfigError, match="ffn_hidden_size has 2 values for 4 MLP sublayers"):
        Network.from_dict({**values, "mlp": {**values["mlp"], "ffn_hidden_size": [44, 40]}})


def test_plain_values_are_short_where_layers_are_alike_and_lists_where_they_differ():
    network = network_from_config(LLAMA)
    assert network.to_dict()["mlp"]["ffn_hidden_size"] == 44
    differs = unlike(network)
    values = json.loads(json.dumps(differs.to_dict()))
    assert values["pattern"] == "*--**-"
    assert values["attention"]["num_heads"] == [6, 2, 8]
    assert values["mlp"]["ffn_hidden_size"] == [44, 36, 20]
    assert values["mlp"]["gated"] is True
    assert Network.from_dict(values) == differs
    assert differs.layers == [(0, 1), (2,), (3,), (4, 5)]
    assert [differs.layer_of(position) for position in range(6)] == [0, 0, 1, 2, 3, 3]
    assert [differs.number(position) for position in range(6)] == [0, 0, 1, 1, 2, 2]


def test_what_earlier_versions_wrote_is_the_same_network():
    former = {
        "pattern": "*-*-*-*-",
        "hidden": 48,
        "ffn": 44,
        "num_heads": 6,
        "num_query_groups": 2,
        "head_dim": 12,
        "vocab": 101,
        "padded_vocab": 128,
        "max_positions": 64,
        "norm": "layernorm",
        "norm_eps": 1e-05,
        "norm_zero_centered": True,
        "activation": "squared_relu",
        "gated": False,
        "qkv_bias": False,
        "linear_bias": False,
        "qk_norm": False,
        "rotary_base": 500.0,
        "rotary_fraction": 0.5,
        "rotary_scaling": None,
        "tied": True,
    }
    assert Network.from_dict(former) == network_from_config(NEMOTRON)


def test_a_config_of_unlike_layers_is_refused_with_what_would_have_to_be_alike():
    with pytest.raises(UnsupportedModelError) as raised:
        config_from_network(unlike(network_from_config(LLAMA)), LLAMA)
    message = str(raised.value)
    assert "attention.num_heads is 6, 2, 8 by layer" in message and "mlp.ffn_hidden_size is 44, 36, 20" in message
    assert "layers 1 have no attention" in message and "layers 2 have no MLP" in message
    assert "format=padded" in message
