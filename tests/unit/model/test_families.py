"""Shapes and Hugging Face configs, both ways."""

import json

import pytest
from transformers import AutoConfig

from minitron_megatron.errors import ConfigError, UnsupportedModelError
from minitron_megatron.model.families import config_from_shape, shape_from_config
from minitron_megatron.model.shape import Llama3RopeScaling, ModelShape
from tests.tiny import FAMILIES, LLAMA, NEMOTRON, NETWORKS, QWEN2
from tests.unit.model.configs import CONFIGS, LLAMA3_ROPE


def in_transformers(config):
    """What transformers takes a config for, defaults filled in."""
    values = dict(config)
    return AutoConfig.for_model(values.pop("model_type"), **values).to_dict()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shapes_survive_plain_values_and_a_hugging_face_config(config):
    shape = shape_from_config(in_transformers(config))
    assert ModelShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape
    written = config_from_shape(shape, config)
    # Once as the file says it, once as transformers reads it.
    assert shape_from_config(written) == shape
    assert shape_from_config(in_transformers(written)) == shape


def test_a_config_says_what_the_shape_says():
    shape = shape_from_config(CONFIGS["llama3 rope"])
    assert shape.rotary_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 16)
    assert (shape.rotary_base, shape.hidden, shape.ffn, shape.head_dim) == (5e3, 48, 44, 12)
    assert (shape.num_layers, shape.heads_per_group, shape.vocab, shape.padded_vocab) == (4, 3, 101, 128)
    shape = shape_from_config(NEMOTRON)
    assert (shape.rotary_fraction, shape.norm_zero_centered, shape.gated, shape.tied) == (0.5, True, False, True)


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
    assert shape_from_config(config) == shape_from_config(in_transformers(config))


def test_families_that_are_the_same_network_have_the_same_shape():
    shapes = {family: shape_from_config(config).replace(tied=False) for family, config in FAMILIES.items()}
    assert shapes["mistral"] == shapes["llama"] and shapes["seed_oss"] == shapes["qwen2"]
    assert len({repr(shape) for shape in shapes.values()}) == len(NETWORKS)


def test_a_llama_whose_width_is_no_multiple_of_the_heads_is_written_as_mistral():
    shape = shape_from_config(LLAMA).replace(hidden=46)
    written = config_from_shape(shape, LLAMA)
    assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert shape_from_config(in_transformers(written)) == shape


def test_a_qwen2_whose_width_is_not_that_of_its_heads_is_written_as_seed_oss():
    """The one's servers divide the width by the heads; what the other's config assumes is not what this one's does."""
    whole = {**QWEN2, "head_dim": 8, "sliding_window": None, "layer_types": ["full_attention"] * 4}
    shape = shape_from_config(whole)
    assert config_from_shape(shape, whole)["model_type"] == "qwen2"
    shape = shape.replace(hidden=46, pattern="*-" * 3)
    written = config_from_shape(shape, whole)
    assert (written["model_type"], written["architectures"]) == ("seed_oss", ["SeedOssForCausalLM"])
    read = in_transformers(written)
    assert shape_from_config(read) == shape
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
        (dict(model_type="qwen2", use_sliding_window=True, sliding_window=32), "sliding_window = 32 is not supported"),
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
        shape_from_config({**LLAMA, **changes})
    assert named in str(raised.value)


def test_a_window_that_no_sequence_fills_is_no_window():
    config = {**LLAMA, "model_type": "mistral", "sliding_window": LLAMA["max_position_embeddings"]}
    assert shape_from_config(config) == shape_from_config({**config, "sliding_window": None})


def test_a_shape_that_cannot_be_lists_every_problem():
    values = shape_from_config(LLAMA).to_dict()
    with pytest.raises(ConfigError) as raised:
        ModelShape.from_dict({**values, "hidden": 0, "padded_vocab": 100, "rotary_fraction": 0.0, "pattern": "*E"})
    named = ("shape.hidden = 0", "['E']", "shape.padded_vocab = 100", "shape.rotary_fraction = 0.0")
    assert all(name in problem for name, problem in zip(named, raised.value.problems, strict=True))
    with pytest.raises(ConfigError, match="num_heads = 6 is not a multiple of shape.num_query_groups = 4"):
        ModelShape.from_dict({**values, "num_query_groups": 4})


def test_what_is_no_shape_names_the_field_and_what_it_may_be():
    values = shape_from_config(LLAMA).to_dict()
    del values["ffn"]
    wrong = {"widht": 3, "norm": "batchnorm", "activation": "relu", "rotary_scaling": {"factor": 8.0, "kind": "yarn"}}
    with pytest.raises(ConfigError) as raised:
        ModelShape.from_dict({**values, **wrong})
    found = raised.value.problems
    assert found[0].startswith("shape.widht is no field: the fields are pattern, hidden, ffn, num_heads, ")
    assert found[1:5] == [
        "shape.ffn is missing: give it a value",
        "shape.norm = 'batchnorm': must be one of rmsnorm, layernorm",
        "shape.activation = 'relu': must be one of silu, gelu, squared_relu",
        "shape.rotary_scaling.kind is no field: the fields are factor, low_freq_factor, high_freq_factor, "
        "original_max_positions",
    ]
    assert [problem.split(" ")[0] for problem in found[5:]] == [
        f"shape.rotary_scaling.{name}" for name in ("low_freq_factor", "high_freq_factor", "original_max_positions")
    ]
