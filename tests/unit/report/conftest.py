import json
import math

import numpy as np
import pytest
import torch

from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.artifacts.output import writing
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.config.schema import TargetConfig
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP
from minitron_megatron.model.network import Network, transformer
from minitron_megatron.pruning.make_plan import make_plan, plan_for
from minitron_megatron.pruning.scores import DepthSettings, Scores
from minitron_megatron.pruning.target import Target
from minitron_megatron.report.html import Stage

LAYER = [Attention(num_heads=6, num_query_groups=2, head_dim=2), MLP(10)]
NETWORK = Network(transformer(5, LAYER), hidden_size=12, vocab_size=7, padded_vocab_size=8)
SIZES = TargetConfig(layers=3, hidden=8, ffn=6, heads=4)
TARGET = NETWORK.replace(sublayers=transformer(3, [Attention(4, 2, 2), MLP(6)]), hidden_size=8)

# Layers 0 to 4: layer 1 has no attention, layer 3 no MLP.
UNLIKE = NETWORK.replace(
    sublayers=(
        *(Attention(6, 2, 2), MLP(10)),
        MLP(7),
        *(Attention(4, 4, 2), MLP(9)),
        Attention(6, 3, 2),
        *(Attention(6, 2, 2), MLP(4)),
    )
)

# Losses between which two thirds of the gap are closed, and numbers that no other number contains.
MODELS = {
    "teacher": {"made_by": "teacher", "parameters": 7654321, "body": 6543219, "loss": 2.5},
    "pruned": {"made_by": "pruned", "parameters": 4321987, "body": 3219876, "loss": 5.5},
    "distilled": {"made_by": "distilled", "parameters": 4321987, "body": 3219876, "loss": 3.5},
}


class RandomSource:
    """Random weights of a network, as a source."""

    dtype = torch.bfloat16

    def __init__(self, network):
        self.network = network

    def read(self, param, index):
        assert all(len(i) <= n for i, n in zip(index, param.shape, strict=True))
        return torch.rand([len(i) for i in index]).to(self.dtype)


def make_scores(network, seed=0):
    """Scores of all different values in every row, in an order that is not sorted; of two depth criteria."""
    random = np.random.default_rng(seed)

    def some(*size):
        return torch.from_numpy(random.permutation(math.prod(size)).reshape(size) + 1.0)

    elements = {
        axis.setting: [some(*network.sublayers[p].score_shape(axis)) for p in network.positions(kind)]
        for kind in network.kinds
        for axis in kind.scored()
    }
    layers = len(network.layers)
    depth = {"block_influence": some(layers) / 10, "kl": some(layers) / 10}
    settings = DepthSettings(protect_first=1)
    return Scores(network, some(network.hidden_size), elements, depth, settings, settings={"corpus": "c0ffee"})


@pytest.fixture(scope="session")
def scores():
    return make_scores(NETWORK)


@pytest.fixture(scope="session")
def plan(scores):
    return make_plan(scores, SIZES)


@pytest.fixture(scope="session")
def unlike_scores():
    return make_scores(UNLIKE)


@pytest.fixture(scope="session")
def unlike_plan(unlike_scores):
    """Every sublayer has its own target; layer 4 goes as a whole."""
    wanted = (Attention(4, 2, 2), MLP(5), MLP(7), Attention(3, 3, 2), MLP(2), Attention(2, 1, 2), *UNLIKE.sublayers[6:])
    return plan_for(unlike_scores, Target(8, wanted, {}, 4, keep_layers=[0, 1, 2, 3]))


@pytest.fixture
def kept_numbers(plan):
    """The layers that the plan keeps."""
    return [position // 2 for position in plan.sublayers[::2]]


@pytest.fixture
def finished_run(tmp_path, scores, plan, metric_lines):
    """Folder and stages of a finished recipe: import, score, prune, distill, three evaluations."""
    return make_run(tmp_path, scores, plan, metric_lines())


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory, scores, plan, metric_lines):
    """The same, for tests that change nothing below the stages' folders."""
    return make_run(tmp_path_factory.mktemp("shared"), scores, plan, metric_lines())


def make_run(folder, scores, plan, lines):
    run = folder / "run"
    run.mkdir()
    source = folder / "model.gguf"
    source.write_text("weights")

    def finish(name, kind, parents, config, network=None):
        parents = [Parent.of(role, path) for role, path in parents.items()]
        return writing(run / name, Manifest(kind, network and network.to_dict(), parents, {"output": name, **config}))

    manifest = Manifest("checkpoint", parents=[Parent.of("source", source)], config={"source": str(source)})
    write_checkpoint(run / "teacher", RandomSource(NETWORK), torch.bfloat16, manifest, None)
    with finish("scores", "scores", {"checkpoint": run / "teacher"}, {"num_samples": 9}, NETWORK) as folder:
        scores.write(folder)
    parents = [Parent.of("checkpoint", run / "teacher"), Parent.of("scores", run / "scores")]
    rounded = {"rounded": ["target.ffn = 0.55 of 10 became 6", "target.heads = 0.7 of 6 became 4"]}
    manifest = Manifest("checkpoint", parents=parents, config={"target": {"hidden": 8}}, details=rounded)
    write_checkpoint(run / "pruned", RandomSource(TARGET), torch.bfloat16, manifest, None, plan.write)
    parents = {"student": run / "pruned", "teacher": run / "teacher"}
    with finish("distilled", "run", parents, {"steps": 6}, TARGET) as folder:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        checkpoint = Manifest("checkpoint", config={"data": {"sequence_length": 16}})
        write_checkpoint(folder / "checkpoints", RandomSource(TARGET), torch.bfloat16, checkpoint, None)
    for number, (name, model) in enumerate(MODELS.items(), start=1):
        with finish(f"evaluate/{name}", "evaluation", {"model": run / name}, {"num_samples": 3}) as folder:
            values = {
                "model": str(run / model["made_by"]),
                "name": name,
                "parameters": model["parameters"],
                "parameters_without_embeddings": model["body"],
                "heldout": {"loss": model["loss"], "perplexity": math.exp(model["loss"]), "num_tokens": 23456},
                "generation": {
                    "tokens_per_s": 30.5 + number,
                    "num_tokens": 64,
                    "prompt": f"Prompt {number} <b>&amp;",
                    "text": f" and <script>alert({number})</script> 'it'\n so",
                },
            }
            (folder / "evaluation.json").write_text(json.dumps(values))
    stages = [
        Stage("teacher", "import", run / "teacher", None),
        Stage("scores", "score", run / "scores", 402.4),
        Stage("pruned", "prune", run / "pruned", 8.26),
        Stage("distilled", "distill", run / "distilled", 3 * 3600 + 7 * 60),
        *(Stage(f"evaluate_{name}", "evaluate", run / "evaluate" / name, 1.5) for name in MODELS),
    ]
    return run, stages
