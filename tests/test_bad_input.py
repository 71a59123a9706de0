"""What users get wrong, through the command line: status 2, a message that names it, nothing written, no work begun.

What is wrong with the settings by themselves is tested where they are composed and read.
"""

import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from minitron_megatron import cli
from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint import convert, huggingface
from minitron_megatron.checkpoint.dist_reader import TRACKER, Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.evaluation import evaluate
from minitron_megatron.model import build
from minitron_megatron.pruning import prune, score
from minitron_megatron.pruning.scores import DepthSettings
from minitron_megatron.training import distill, setup
from tests.tiny import LLAMA, changed, hf_model, import_hf, literate, scores_by_chance, without_sublayers

BUILDS = [(module, "build_model") for module in (score, setup, evaluate)]
READS = [(module, name) for module in (score, distill, evaluate) for name in ("parallel_context", "prepare_corpus")]
WRITES = [
    (prune, "write_pruned"),
    (score, "write_pruned"),
    (convert, "write_checkpoint"),
    (convert, "write_huggingface"),
]


class Zeros:
    """Weights that are all zero."""

    dtype = torch.float32

    def __init__(self, network):
        self.network = network

    def read(self, param, index):
        return torch.zeros([len(i) for i in index])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Checkpoints, scores and texts, most of them with something wrong."""
    folder = tmp_path_factory.mktemp("inputs")
    import_hf(folder / "teacher", literate(hf_model(**LLAMA), "abcd"))
    import_hf(folder / "student", hf_model(**{**LLAMA, "num_hidden_layers": 2, "hidden_size": 36}))
    import_hf(folder / "foreign", hf_model(**{**LLAMA, "vocab_size": 90}))
    for name in ("foreign", "teacher", "student"):
        (folder / name / "checkpoint").rename(folder / f"{name}-checkpoint")
    teacher = folder / "teacher-checkpoint"
    for damaged in ("other-tokenizer", "lost-shard", "short-shard", "flipped-shard", "other-keys"):
        shutil.copytree(teacher, folder / damaged)
    tokenizer = folder / "other-tokenizer/huggingface/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a"', '"ä"'))
    manifest = folder / "other-keys/manifest.json"
    said = json.loads(manifest.read_text())
    said["network"]["tie_embeddings"] = said["network"]["attention"]["qkv_bias"] = True
    manifest.write_text(json.dumps(said))
    (folder / "lost-shard/release/__0_0.distcp").unlink()
    shard = folder / "short-shard/release/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1000])

    shard = folder / "flipped-shard/release/__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    network = Checkpoint(teacher).network
    for name, scored in (("scores", network), ("other-scores", network.replace(hidden_size=40))):
        (folder / name).mkdir()
        scores = scores_by_chance(scored)
        scores.depth_settings = DepthSettings(protect_first=1, protect_last=1)
        scores.write(folder / name)
        Manifest("scores").write(folder / name)

    hf_assets = teacher / "huggingface"
    unbuilt = network.replace(sublayers=(*changed(network, bias=True).sublayers[:1], *network.sublayers[1:]))
    for name, other in (("other-order", without_sublayers(network, 4)), ("other-layer", unbuilt)):
        write_checkpoint(folder / name, Zeros(other), torch.float32, Manifest("checkpoint"), hf_assets)

    questions = [{"context": "a", "choices": ["b", "c"], "answer": answer} for answer in (1, 2)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    gpt2 = folder / "gpt2"
    gpt2.mkdir()
    (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    generator = np.random.default_rng(0)
    documents = [{"text": "".join(generator.choice(list("abcd"), 100))} for _ in range(40)]
    for name, count in (("text", 40), ("one", 1), ("empty", 0)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents[:count]))
    return folder


def forbid(monkeypatch, functions):
    for module, name in functions:
        monkeypatch.setattr(module, name, lambda *arguments, name=name, **options: pytest.fail(f"{name} was called"))


@pytest.fixture
def refused(inputs, tmp_path, monkeypatch, capsys):
    """Runs a command, `@NAME` standing for an input, and returns what it says when it is refused."""
    monkeypatch.chdir(tmp_path)

    def refused(command, ranks=1):
        if ranks > 1:  # as the first of several ranks finds it, before it would wait for the others
            world = {"RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
            monkeypatch.setattr(os, "environ", {**os.environ, **world})
        verb, *arguments = command.replace("@", f"{inputs}/").split()
        assert cli.main([verb, *arguments]) == 2
        out, error = capsys.readouterr()
        told = [line for line in error.splitlines() if line.startswith(f"minitron {verb}: ")]
        assert told and "Traceback" not in error and not out
        return error

    return refused


SCORE = "score checkpoint=@teacher-checkpoint output=out data.text=[@text.jsonl] data.sequence_length=32"
DISTILL = "distill student=@student-checkpoint teacher=@teacher-checkpoint output=out data.text=[@text.jsonl]"
EVALUATE = "evaluate model=@teacher-checkpoint output=out data.text=[@text.jsonl]"
PRUNE = "prune checkpoint=@teacher-checkpoint scores=@scores output=out"


def with_other(command, key, value):
    """A command with another value for one of its settings."""
    return " ".join(f"{key}={value}" if word.startswith(f"{key}=") else word for word in command.split())


@pytest.mark.parametrize(
    "command, ranks, named",
    [
        (
            f"{SCORE} parallel.tensor=3",
            3,
            ["checkpoint.attention.num_query_groups = 2 does not divide by parallel.tensor = 3: choose a tensor size"],
        ),
        (f"{SCORE} parallel.pipeline=5", 5, ["checkpoint has 4 layers, too few for the 5 stages of parallel.pipeline"]),
        (f"{EVALUATE} parallel.tensor=3", 3, ["model.padded_vocab_size = 128 does not divide by parallel.tensor = 3"]),
        (
            f"{DISTILL} parallel.tensor=3",
            3,
            [
                "student.attention.num_query_groups = 2",
                "teacher.attention.num_query_groups = 2",
                "teacher.padded_vocab_size = 128",
            ],
        ),
        (
            f"{DISTILL} parallel.pipeline=2 parallel.virtual_pipeline=2",
            2,
            ["student has 2 layers", "4 stages of parallel.pipeline x virtual_pipeline = 2 x 2: lower one of the two"],
        ),
        (f"{SCORE} parallel.tensor=2", 3, ["2 x 1 x 1 = 2 ranks, but the world has 3"]),
        (f"{SCORE} parallel.tensor=2 parallel.sequence=true data.sequence_length=33", 1, ["data.sequence_length = 33"]),
        (
            with_other(DISTILL, "teacher", "@foreign-checkpoint"),
            1,
            ["foreign-checkpoint", "carry different tokenizers"],
        ),
        (with_other(DISTILL, "teacher", "@other-tokenizer"), 1, ["other-tokenizer", "carry different tokenizers"]),
        (
            with_other(DISTILL, "teacher", "@other-keys"),
            1,
            [
                "other-keys/release does not hold its network",
                "missing: decoder.layers.self_attention.linear_qkv.bias [4, 120]",
                "unknown: output_layer.weight [128, 48]",
            ],
        ),
        (f"{DISTILL} teacher_fp8=true", 1, ["teacher_fp8 = true needs CUDA and Transformer Engine"]),
        (f"{DISTILL} teacher_lr=0", 1, ["teacher_lr = 0.0: must be above 0, or null for a frozen teacher"]),
        (
            f"{DISTILL} teacher_lr=1 loss.kd_logits_weight=0 loss.lm_weight=1",
            1,
            ["teacher_lr = 1.0 trains a teacher that no loss uses: set loss.kd_logits_weight above 0"],
        ),
        (f"{DISTILL} teacher_lr=1 teacher_dtype=fp16", 1, ["teacher_lr = 1.0 trains the teacher", "teacher_dtype"]),
        (
            f"{with_other(DISTILL, 'teacher', 'null')} teacher_lr=1 loss.kd_logits_weight=0 loss.lm_weight=1",
            1,
            ["teacher_lr = 1.0, but teacher = null: set both or neither"],
        ),
        (f"{DISTILL} keep_checkpoints=0", 1, ["keep_checkpoints = 0"]),
        (f"{DISTILL} loss.logits.top_k=102", 1, ["loss.logits.top_k = 102 is more than the vocabulary's 101 tokens"]),
        (f"{DISTILL} loss.logits.top_k=101 loss.logits.tail=true", 1, ["loss.logits.top_k = 101 is more than the"]),
        (f"{DISTILL} loss.logits.temperature=0", 1, ["loss.logits.temperature = 0.0: must be above 0"]),
        (
            f"{DISTILL} loss.hidden.weight=1 loss.hidden.pairs=[[0,9]]",
            1,
            ["loss.hidden.pairs has [0, 9], and the teacher has layers 0 to 3: name one of these"],
        ),
        (
            f"{DISTILL} steps=50 loss.schedule={{lm_weight:{{points:[[1,0.5],[51,1]]}}}}",
            1,
            ["loss.schedule.lm_weight.points has step 51, and steps = 50: end at 50 or before"],
        ),
        (f"{PRUNE} target.hidden=49", 1, ["target.hidden = 49 is larger than the source's 48"]),
        (f"{PRUNE} target.ffn=[30,31]", 1, ["target.ffn has 2 sizes, and the source has 4 MLP sublayers: give one"]),
        (f"{PRUNE} target.ffn=[30,44,45,1]", 1, ["target.ffn = 45 in layer 2's MLP is larger than the source's 44"]),
        (
            f"{PRUNE} target.ffn=[30,44,31,2] parallel.tensor=2",
            1,
            ["target.ffn = 31 in layer 2 does not divide by parallel.tensor = 2"],
        ),
        (f"{PRUNE} target.heads=3", 1, ["target.heads = 3 is not a multiple of the 2 query groups"]),
        (
            f"{PRUNE} target.ffn=31 parallel.tensor=2",
            1,
            ["target.ffn = 31 does not divide by parallel.tensor = 2"],
        ),
        (
            f"{SCORE} depth.search=greedy target.layers=1",
            1,
            ["depth.protect_last = 1 leave 2 of 4 layers, and the target drops 3: protect less"],
        ),
        (f"{SCORE} depth.search=block target.layers=4", 1, ["depth.search = block, and target leaves no layer out"]),
        (
            f"{SCORE} rounds=2 target.ffn=45",
            1,
            ["target.ffn = 45 is larger than the source's 44: pruning only removes"],
        ),
        (
            f"{SCORE} depth.criteria=[accuracy] depth.choices=@questions.jsonl",
            1,
            ["questions.jsonl, line 2: answer = 2 must be the index of one of the 2 choices, from 0"],
        ),
        (f"{PRUNE} target.heads=2 merge_heads=true", 1, ["merging needs at least half of them; keep 4 heads or set"]),
        (f"{PRUNE} target.layers=1", 1, ["target keeps 1 layers, and 2 are protected (depth.protect_first = 1"]),
        (f"{PRUNE} target.layers=3 depth_criterion=kl", 1, ["depth_criterion = kl was not scored: there are loss;"]),
        ("prune checkpoint=@teacher-checkpoint plan=@text.jsonl output=out", 1, ["text.jsonl is not a plan: "]),
        ("prune checkpoint=@teacher-checkpoint plan=@nowhere output=out", 1, ["nowhere is not a plan: "]),
        (f"{PRUNE} target.layers=3 parallel.pipeline=4", 1, ["target has 3 layers, too few for the 4 stages"]),
        (with_other(PRUNE, "scores", "@other-scores") + " target.ffn=30", 1, ["other-scores is of another network"]),
        (with_other(PRUNE, "scores", "@student") + " target.ffn=30", 1, ["student is not the finished output of"]),
        (
            "import source=@gpt2 output=out",
            1,
            ["model_type = 'gpt2' is not supported: choose a model of one of llama,"],
        ),
        (
            "export checkpoint=@other-order output=out",
            1,
            ["no class of transformers has layers of unlike sizes, and layers 2 have no attention: make these alike"],
        ),
        (
            f"{EVALUATE} tasks=[arc_easy] task_dir=@nowhere",
            1,
            ["nowhere is not a folder: name one with the YAML files of tasks"],
        ),
        ("compare evaluations=[@teacher-checkpoint,@nowhere]", 1, ["teacher-checkpoint is not an evaluation: it has"]),
        ("import source=@nowhere output=out", 1, ["nowhere does not exist: name a Hugging Face folder or a .gguf"]),
        ("import source=@scores output=out", 1, ["scores is not a Hugging Face folder: it has no config.json"]),
    ],
    ids=lambda value: "" if isinstance(value, int | list) else value.replace("data.text=[@text.jsonl] ", ""),
)
def test_what_does_not_fit_is_named_before_any_work(command, ranks, named, refused, monkeypatch, tmp_path):
    forbid(monkeypatch, BUILDS + READS + WRITES)
    message = refused(command, ranks)
    for part in named:
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command, key", [(SCORE, "checkpoint"), (DISTILL, "student"), (DISTILL, "teacher"), (EVALUATE, "model")]
)
def test_layers_that_cannot_be_built_are_named_before_any_work(command, key, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    forbid(monkeypatch, BUILDS + READS + WRITES)
    message = refused(with_other(command, key, "@other-layer"))
    expected = f"{key}: layer 0 has sublayers of unlike add_bias_linear, which takes HybridModel, and megatron-core "
    assert expected in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad, named",
    [
        ("@nowhere", "nowhere does not exist: name the folder of a checkpoint"),
        ("@scores", f"scores is not a checkpoint: it has no {TRACKER}"),
        ("@teacher-checkpoint/release", "release is one iteration: name "),
        ("@lost-shard", "lost-shard/release/__0_0.distcp is missing: the checkpoint is not whole"),
        ("@short-shard", "short-shard/release/__0_0.distcp has "),
    ],
)
@pytest.mark.parametrize(
    "command, key",
    [
        (SCORE, "checkpoint"),
        (f"{PRUNE} target.ffn=30", "checkpoint"),
        (DISTILL, "student"),
        (DISTILL, "teacher"),
        (EVALUATE, "model"),
        ("export checkpoint=@teacher-checkpoint output=out", "checkpoint"),
    ],
    ids=["score", "prune", "distill student", "distill teacher", "evaluate", "export"],
)
def test_what_is_no_whole_checkpoint_is_named_before_any_work(command, key, bad, named, refused, monkeypatch, tmp_path):
    forbid(monkeypatch, BUILDS + READS + WRITES)
    assert named in refused(with_other(command, key, bad))
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_is_named_and_leaves_nothing_behind(refused, tmp_path):
    message = refused(with_other(f"{PRUNE} target.ffn=30", "checkpoint", "@flipped-shard"))
    assert "flipped-shard/release/__0_0.distcp is damaged at byte " in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, length, named",
    [
        ("@nowhere", 32, "nowhere, which does not exist: name a file, a folder, the prefix"),
        ("@empty.jsonl", 32, "has no text in it: name other files"),
        ("@one.jsonl", 32, "is one document, so that none could be held out"),
        ("@text.jsonl", 4096, "training tokens, but data.sequence_length = 4096 needs 4097: add text, shorten"),
    ],
)
@pytest.mark.parametrize("command", [SCORE, DISTILL, EVALUATE], ids=["score", "distill", "evaluate"])
def test_a_text_that_is_not_enough_is_named_before_a_model_is_built(
    command, text, length, named, refused, monkeypatch, tmp_path
):
    forbid(monkeypatch, BUILDS)
    if command == EVALUATE:  # which reads nothing else
        named = named.replace("training", "held-out")
    assert named in refused(f"{with_other(command, 'data.text', f'[{text}]')} data.sequence_length={length}")
    # A text has to be cut into tokens to be found too short; they are kept for other sequence lengths.
    assert [path.name for path in tmp_path.iterdir()] == (["corpora"] if "tokens" in named else [])


@pytest.mark.parametrize("command", [DISTILL, EVALUATE], ids=["distill", "evaluate"])
def test_held_out_text_that_is_not_enough_is_named_before_a_model_is_built(command, refused, monkeypatch):
    forbid(monkeypatch, BUILDS)
    message = refused(f"{with_other(command, 'data.text', '[@text.jsonl]')} data.sequence_length=512")
    assert "held-out tokens, but data.sequence_length = 512 needs 513: add text, shorten" in message


@pytest.mark.parametrize(
    "command",
    [
        f"{PRUNE} target.ffn=30",
        DISTILL + " data.sequence_length=32",
        "export checkpoint=@teacher-checkpoint output=out",
    ],
    ids=["prune", "distill", "export"],
)
def test_a_disk_that_is_too_small_is_named_before_anything_is_written(command, refused, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 5000))
    forbid(monkeypatch, [*BUILDS, (huggingface, "write_shards")])
    assert "has 0.01 MB free" in refused(command)
    assert {path.name for path in tmp_path.iterdir()} <= {"corpora"}
