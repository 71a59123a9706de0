"""Checkpoints as a Megatron-Bridge run writes them are exported, by the file of settings that it saves beside them."""

import pytest
import torch

from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import ExportConfig
from minitron_megatron.errors import CheckpointError, UnsupportedModelError
from minitron_megatron.model.families import network_from_config
from tests.tiny import LLAMA
from tests.unit.checkpoint.megatron_lm import copy_of, logits_of_folder

BRIDGE = """
_target_: megatron.bridge.training.config.ConfigContainer
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  num_layers: 4
  hidden_size: 48
  ffn_hidden_size: 44
  num_attention_heads: 6
  num_query_groups: 2
  kv_channels: 12
  normalization: RMSNorm
  layernorm_epsilon: 1.0e-05
  layernorm_zero_centered_gamma: false
  activation_func: {_call_: false, _target_: torch.nn.functional.silu}
  gated_linear_unit: true
  add_bias_linear: false
  add_qkv_bias: false
  qk_layernorm: false
  position_embedding_type: rope
  rotary_base: 500
  rotary_percent: 1.0
  rope_scaling: false
  seq_length: 64
  seq_len_interpolation_factor: null
  share_embeddings_and_output_weights: false
  vocab_size: 101
  should_pad_vocab: true
  make_vocab_size_divisible_by: 128
  num_moe_experts: null
  transformer_layer_spec: {_call_: false, _target_: megatron.bridge.models.gpt_provider.default_layer_spec}
  params_dtype: {_call_: false, _target_: torch.float32}
"""


@pytest.fixture
def bridge(trained, tmp_path):
    """The same weights, as Megatron-Bridge saves them: without args, with its own file."""
    root = copy_of(trained[0], tmp_path / "run")
    common = torch.load(root / "iter_0000100/common.pt", weights_only=False)
    del common["args"]
    torch.save(common, root / "iter_0000100/common.pt")
    (root / "iter_0000100/run_config.yaml").write_text(BRIDGE)
    return root


def test_a_run_of_megatron_bridge_is_exported(bridge, trained, tokenizer, tmp_path):
    assert Checkpoint(bridge).network == network_from_config(LLAMA)
    folder = export(ExportConfig(str(bridge), str(tmp_path / "out"), huggingface=str(tokenizer)))
    torch.testing.assert_close(logits_of_folder(folder), trained[1][..., :101], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("functional.silu", "functional.tanh", "activation_func = 'torch.nn.functional.tanh' with gated_linear_unit"),
        ("num_moe_experts: null", "num_moe_experts: 8", "num_moe_experts = 8 is not supported (mixtures of experts"),
        ("model:", "other:", "run_config.yaml does not describe a model: KeyError('model')"),
        ("params_dtype: ", "params_dtype: !!python/name:os.system ", "run_config.yaml does not describe a model"),
        ("vocab_size: 101", "vocab_size: null", "padded_vocab_size is missing"),
    ],
)
def test_what_is_wrong_in_a_run_config_is_named(old, new, message, bridge):
    path = bridge / "iter_0000100/run_config.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        Checkpoint(bridge)
    assert message in str(caught.value)
