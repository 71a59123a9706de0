"""The memory that importing, pruning and exporting take depends on the size of a chunk and not on that of the model,
and layers that go cost nothing.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint import row_io
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.config.schema import PruneConfig, TargetConfig
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP
from minitron_megatron.model.network import Network, transformer
from minitron_megatron.pruning.prune import prune
from tests.tiny import LLAMA, hf_model, random_scores, save_hf, write_gguf

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")

CHUNK, BLOCK, THREADS = 4 * 2**20, 2**20, 2
# Of each thread: a chunk as it is read, and once more where it is converted or cut; and a block with what is cut of it.
BOUND = THREADS * (2 * CHUNK + 3 * BLOCK) + 4 * 2**20
# De-quantised values are of float32, twice a chunk's size, and exist four times: as the package makes them of blocks,
# as it returns them, as columns are taken of them, and as they are converted.
BOUND_OF_GGUF = BOUND + THREADS * 4 * 2 * CHUNK
LAYERS = {"small": 4, "large": 8}

_RUN = f"""
import json, sys
from pathlib import Path

from minitron_megatron.checkpoint import dist_reader, dist_writer, row_io, safetensors_writer
from minitron_megatron.checkpoint.convert import export, import_checkpoint
from minitron_megatron.config.schema import DType, ExportConfig, ImportConfig, PruneConfig, TargetConfig
from minitron_megatron.pruning.prune import prune

folder, verb, name, hoards = sys.argv[1:]
row_io.BLOCK_BYTES, num_threads = {BLOCK}, {THREADS}
dist_writer.CHUNK_BYTES = safetensors_writer.BLOCK_BYTES = {CHUNK}
dist_writer.num_threads = safetensors_writer.num_threads = lambda: num_threads
if hoards == "True":
    read, hoard = dist_reader.Checkpoint.read, []
    dist_reader.Checkpoint.read = lambda *args: hoard.append(read(*args)) or hoard[-1]

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {{line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}}

def run(name):
    paths = [f"{{folder}}/{{part}}" for part in (name, f"{{name}}-pruned", f"{{name}}-scores")]
    if verb.startswith("import"):
        suffix = ".gguf" if verb == "import gguf" else "-hf"
        import_checkpoint(ImportConfig(paths[0] + suffix, f"{{paths[0]}}-imported", DType.BF16))
    elif verb == "export":
        export(ExportConfig(*paths[:2], max_shard_gb=0.05))
    else:
        prune(PruneConfig(*paths, target=TargetConfig(hidden=768, ffn=3072)))

run("tiny")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory()["VmRSS"]
run(name)
print(json.dumps(memory()["VmHWM"] - before))
"""


class RandomWeights:
    dtype = torch.bfloat16

    def __init__(self, network):
        self.network = network

    def read(self, param, index):
        return torch.randint(-(2**15), 2**15, [len(i) for i in index], dtype=torch.int16).view(torch.bfloat16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints of 140 and 270 MB, one of which has the layers of the other twice; and a tiny one."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "companions").mkdir()
    (folder / "companions/config.json").write_text('{"model_type": "llama"}')
    for name, num_layers in {"tiny": 1, **LAYERS}.items():
        layer = Attention(num_heads=8, num_query_groups=4, head_dim=128), MLP(ffn_hidden_size=4096)
        network = Network(transformer(num_layers, layer), 1024, vocab_size=1024, padded_vocab_size=1024)
        manifest = Manifest("checkpoint")
        write_checkpoint(folder / name, RandomWeights(network), torch.bfloat16, manifest, folder / "companions")
        random_scores(folder / f"{name}-scores", network)
    return folder


@pytest.fixture(scope="module")
def sources(models):
    """The same networks as Hugging Face folders and as GGUF files."""
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=4, head_dim=128)
    for name, num_layers in {"tiny": 1, "large": LAYERS["large"]}.items():
        model = hf_model(**LLAMA | sizes | dict(num_hidden_layers=num_layers, vocab_size=1024))
        write_gguf(models / f"{name}.gguf", model, ["Q8_0"])
        save_hf(models / f"{name}-hf", model.bfloat16())
    return models


def peak(models, tmp_path, verb, name, hoards=False) -> int:
    """Bytes that a process needs at most for its work, beyond those that it needs anyway."""
    for each in models.iterdir():
        (tmp_path / each.name).symlink_to(each)
    command = [sys.executable, "-c", _RUN, str(tmp_path), verb, name, str(hoards)]
    # Blocks of the usual size are given back to the system when they are freed. Those of the sizes here are kept by
    # malloc, in as many heaps as there are threads, if it isn't told otherwise.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("verb, name", [("prune", "small"), ("prune", "large"), ("export", "large")])
def test_the_peak_is_bounded_by_the_chunks_and_not_by_the_model(verb, name, models, tmp_path):
    assert peak(models, tmp_path, verb, name) < BOUND


@pytest.mark.parametrize("source, bound", [("hf", BOUND), ("gguf", BOUND_OF_GGUF)])
def test_the_peak_of_an_import_is_bounded(source, bound, sources, tmp_path):
    assert peak(sources, tmp_path, f"import {source}", "large") < bound


def test_a_layer_that_goes_is_not_read_and_the_others_are_once(models, tmp_path, monkeypatch):
    num_bytes, fill = [], row_io._fill
    monkeypatch.setattr(row_io, "_fill", lambda buffer, file: num_bytes.append(len(buffer)) or fill(buffer, file))
    paths = [str(models / "large"), str(tmp_path / "pruned"), str(models / "large-scores")]
    prune(PruneConfig(*paths, target=TargetConfig(layers=3)))
    assert sum(num_bytes) == 2 * num_parameters(Checkpoint(tmp_path / "pruned").network)


def test_who_reads_the_whole_model_would_be_noticed(models, tmp_path):
    assert peak(models, tmp_path, "prune", "large", hoards=True) > 4 * BOUND
