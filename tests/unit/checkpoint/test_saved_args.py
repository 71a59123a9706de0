"""Megatron-LM's args follow the shape of a pruned network, and only plain values are loaded."""

import argparse
import copy
import logging
import os
import signal

import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import RerunMode
from megatron.core.transformer.enums import AttnBackend

from minitron_megatron.checkpoint.manifest import Manifest
from minitron_megatron.checkpoint.saved_args import read_args
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.config.schema import PruneConfig, TargetConfig
from minitron_megatron.model.megatron_args import args_of_shape
from minitron_megatron.pruning.prune import prune
from minitron_megatron.pruning.scores import Scores
from tests.tiny import LLAMA, hf_model, import_hf

ARGS = argparse.Namespace(
    num_layers=4,
    encoder_num_layers=4,
    hidden_size=48,
    ffn_hidden_size=44,
    num_attention_heads=6,
    group_query_attention=True,
    num_query_groups=2,
    kv_channels=12,
    padded_vocab_size=128,
    max_position_embeddings=64,
    seq_length=32,
    swiglu=True,
    rotary_base=500,
    model_type=ModelType.encoder_or_decoder,
    attention_backend=AttnBackend.auto,
    rerun_mode=RerunMode.VALIDATE_RESULTS,
    exit_signal=signal.SIGTERM,
    params_dtype=torch.bfloat16,
    data_path=["a", "b"],
    iteration=1000,
    consumed_train_samples=64000,
    consumed_valid_samples=640,
    skipped_train_samples=3,
    no_save_optim=None,
    decoder_first_pipeline_num_layers=1,
    virtual_pipeline_model_parallel_size=2,
    pipeline_model_parallel_layout=None,
)


class Unknown:
    pass


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save(path, **common):
    """As Megatron-Core's `save_common` does."""
    torch.save({"iteration": 1000, "checkpoint_version": 3.0, **common}, path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint and scores of it."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoint = Checkpoint(import_hf(folder, hf_model(**LLAMA)))
    (folder / "scores").mkdir()
    *width, depth = (torch.rand(*size) for size in [(48,), (4, 44), (4, 2, 3), (4,)])
    Scores(checkpoint.shape, *width, {"loss": depth}).write(folder / "scores")
    Manifest("scores").write(folder / "scores")
    return folder


def pruned(folder, output):
    target = TargetConfig(layers=3, hidden=40, ffn=30, heads=4)
    prune(PruneConfig(str(folder / "checkpoint"), str(output), str(folder / "scores"), target=target))
    return torch.load(output / "iter_0000000/common.pt", weights_only=False)


def test_args_follow_the_shape(llama, tmp_path):
    save(llama / "checkpoint/iter_0000000/common.pt", args=copy.deepcopy(ARGS), optimizer={"step": 1000})
    common = pruned(llama, tmp_path / "pruned")
    assert common.keys() == {"iteration", "checkpoint_version", "args"} and common["iteration"] == 0
    before, after = vars(ARGS), vars(common["args"])
    changes = {name: after[name] for name in after if name not in before or after[name] != before[name]}
    assert changes == {
        "num_layers": 3,
        "encoder_num_layers": 3,
        "hidden_size": 40,
        "ffn_hidden_size": 30,
        "num_attention_heads": 4,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
        "decoder_first_pipeline_num_layers": None,
        "virtual_pipeline_model_parallel_size": None,
    }
    assert before.keys() <= after.keys()


def test_args_of_sublayers_in_another_order_name_it(llama):
    shape = Checkpoint(llama / "checkpoint").shape.replace(pattern="*-*--")
    args = args_of_shape(ARGS, shape)
    assert (args.num_layers, args.hybrid_layer_pattern) == (5, "*-*--") and "hybrid_layer_pattern" not in ARGS


@pytest.mark.parametrize("place", ["in the args", "beside them"])
@pytest.mark.parametrize("kind", ["Unknown", "Evil"])
def test_what_is_no_plain_value_is_named_and_not_run(kind, place, llama, tmp_path, caplog):
    marker = tmp_path / "was-run"
    other = Unknown() if kind == "Unknown" else Evil(f"touch {marker}")
    args = argparse.Namespace(**vars(ARGS), tokenizer=other) if place == "in the args" else ARGS
    path = llama / "checkpoint/iter_0000000/common.pt"
    save(path, args=args, **({"other": other} if place == "beside them" else {}))
    with caplog.at_level(logging.WARNING):
        assert "args" not in pruned(llama, tmp_path / "pruned")
    name = f"{__name__}.Unknown" if kind == "Unknown" else "system"
    [message] = [record.getMessage() for record in caplog.records if "common.pt" in record.getMessage()]
    assert message.startswith(f"{path} holds ") and name in message and "Megatron's args are left out" in message
    assert not marker.exists()


def test_a_checkpoint_without_args_has_none(tmp_path, caplog):
    save(tmp_path / "common.pt")
    assert read_args(tmp_path / "common.pt") is None
    assert read_args(tmp_path / "missing.pt") is None
    assert not caplog.records
