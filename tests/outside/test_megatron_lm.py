"""Megatron-LM's own trainer on what pruning wrote, and what it saves exported again, for every family.

`MEGATRON_LM` names a checkout of the version of the Megatron-Core that is installed.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoModelForCausalLM

from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import ExportConfig, PruneConfig, TargetConfig
from minitron_megatron.pruning.prune import prune
from tests.tiny import FAMILIES, hf_model, import_hf, random_scores

CHECKOUT = os.environ.get("MEGATRON_LM")
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="MEGATRON_LM names no checkout of Megatron-LM")

VOCAB = 128  # without padding, whose rows Megatron-LM counts as tokens
TARGET = TargetConfig(layers=2, hidden=46, ffn=32, heads=4)
LAYOUTS = {"one rank": (1, 1), "tensor 2": (2, 1), "pipeline 2": (1, 2)}
ARGUMENTS = shlex.split("""
    --use-checkpoint-args --ckpt-format=torch_dist --tokenizer-type=HuggingFaceTokenizer
    --split=80,10,10 --seq-length=16 --micro-batch-size=2 --global-batch-size=2 --num-workers=0
    --train-iters=2 --lr=1e-2 --save-interval=1 --log-interval=1 --eval-iters=0 --eval-interval=1000
    --distributed-backend=gloo --transformer-impl=local --no-persist-layer-norm --no-rope-fusion
    --no-masked-softmax-fusion --no-gradient-accumulation-fusion
""")
# What --use-checkpoint-args does not read, or reads under a name that nothing in Megatron-LM has any more.
BY_HAND = {"qwen3": ["--qk-layernorm"], "nemotron": ["--apply-layernorm-1p"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("corpus") / "random"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    generator = np.random.default_rng(0)
    for _ in range(40):
        tokens = generator.integers(0, VOCAB, 50)
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def pretrain(load: Path, save: Path, corpus: Path, tensor: int, pipeline: int, by_hand: list[str]) -> list[dict]:
    """Two steps of Megatron-LM, each saved: the tokens, labels and losses per token of each."""
    batches = save.with_name("batches")
    batches.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tensor * pipeline}"]
    command += [Path(__file__).with_name("pretrain_on_cpu.py"), Path(CHECKOUT) / "pretrain_gpt.py", *ARGUMENTS]
    command += [
        f"--load={load}",
        f"--tokenizer-model={load / 'huggingface'}",
        f"--save={save}",
        f"--data-path={corpus}",
    ]
    command += [f"--tensor-model-parallel-size={tensor}", f"--pipeline-model-parallel-size={pipeline}", *by_hand]
    own = str(Path(__file__).parents[2])
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", "BATCHES": batches, "PYTHONPATH": own}
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    ranks = [torch.load(file) for file in sorted(batches.iterdir())]
    assert len(ranks) == tensor * pipeline
    return [{"tokens": first["tokens"], **last} for first, last in zip(ranks[0], ranks[-1], strict=True)]


def in_transformers(checkpoint: Path, **settings):
    folder = export(ExportConfig(str(checkpoint), f"{checkpoint}, exported", **settings))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def losses(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        logits = model(batch["tokens"]).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")


@pytest.mark.parametrize(
    "family, layout", [(family, "one rank") for family in FAMILIES] + [("qwen2", name) for name in LAYOUTS][1:]
)
def test_it_trains_what_was_pruned_and_what_it_saves_is_exported(tmp_path, corpus, family, layout):
    checkpoint = import_hf(tmp_path, hf_model(**FAMILIES[family] | {"vocab_size": VOCAB}))
    random_scores(tmp_path / "scores", Checkpoint(checkpoint).network)
    pruned = prune(PruneConfig(str(checkpoint), str(tmp_path / "pruned"), str(tmp_path / "scores"), target=TARGET))
    trained = tmp_path / "trained"
    first, second = pretrain(pruned, trained, corpus, *LAYOUTS[layout], BY_HAND.get(family, []))

    original = in_transformers(pruned)
    expected = losses(original, first)
    assert expected.std() > 0.3  # or the tolerance below would say little
    torch.testing.assert_close(first["losses"], expected, rtol=1e-4, atol=1e-4)
    (trained / "latest_checkpointed_iteration.txt").write_text("1")
    expected = losses(in_transformers(trained, huggingface=str(pruned / "huggingface")), second)
    torch.testing.assert_close(second["losses"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(losses(original, second), expected, rtol=1e-2)
