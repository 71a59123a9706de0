"""A kind of layer that the package does not know, with a family of its own, through all of it.

All that is known of the kind stands in this file, which is a plugin: `plugins=[tests.distributed.test_toy_kind]`. The
package is not touched, and that is what is tested.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minitron_megatron.cli import main
from minitron_megatron.config import axes
from minitron_megatron.model.axes import HIDDEN, Axis, Part, Row
from minitron_megatron.model.families import FAMILIES, Family, register_family
from minitron_megatron.model.layers import DENSE, KINDS, PrunableAxis, Slot, Sublayer, register
from minitron_megatron.model.layers.sublayer import LayerModules, Tap
from minitron_megatron.model.network import Network, pad_vocab, transformer
from minitron_megatron.model.norms import norm_rows

pytestmark = pytest.mark.oldest

PLUGIN = "tests.distributed.test_toy_kind"
BOTTLENECK = Axis("bottleneck")
_HF = "model.layers.{layer}.squeeze."


@dataclass(frozen=True)
class Squeeze(Sublayer):
    """Down to a few channels, a tanh, and up again."""

    bottleneck_size: int

    symbol: ClassVar = "B"
    name: ClassVar = "squeeze"
    title: ClassVar = "bottleneck"
    slot: ClassVar = Slot.CHANNEL
    prunable: ClassVar = (
        PrunableAxis("bottleneck", BOTTLENECK, "bottleneck channel", "channels of every bottleneck."),
    )

    @property
    def sizes(self) -> dict[str, int]:
        return {BOTTLENECK.name: self.bottleneck_size}

    def resized(self, lengths: Mapping[str, int]) -> Squeeze:
        return dataclasses.replace(self, bottleneck_size=lengths.get(BOTTLENECK.name, self.bottleneck_size))

    def split_problems(self, ranks: int, where: str) -> list[str]:
        if self.bottleneck_size % ranks == 0:
            return []
        return [f"{where}.bottleneck_size = {self.bottleneck_size} does not divide by parallel.tensor = {ranks}"]

    def rows(self, network: Network) -> list[Row]:
        def row(name: str, dims: tuple) -> Row:
            return Row(f"mlp.{name}.weight", dims, BOTTLENECK.name, (Part(f"{_HF}{name}.weight"),), matmul=True)

        norm = norm_rows(network.norm, HIDDEN, "mlp.norm_", "model.layers.{layer}.norm2.")
        return [*norm, row("down", (BOTTLENECK, HIDDEN)), row("up", (HIDDEN, BOTTLENECK))]

    def activation_bytes(
        self, network: Network, micro_batch: int, sequence_length: int, tensor_ranks: int, number_bytes: int
    ) -> int:
        return micro_batch * sequence_length * 2 * self.bottleneck_size // tensor_ranks * number_bytes

    def megatron_fields(self) -> dict[str, Any]:
        return {}

    def modules(self, config) -> LayerModules:
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

        from minitron_megatron.model import specs

        module = make_module(self.bottleneck_size)
        return LayerModules(
            specs.norm_module(config), module, get_bias_dropout_add, {"pre_mlp_layernorm.": "mlp.norm_"}
        )

    def taps(self, layer: nn.Module, before_activation: bool) -> list[Tap]:
        return [Tap("bottleneck", layer.mlp.up, True, lambda x: x)]


def make_module(size: int) -> type[nn.Module]:
    """The module of a bottleneck on a tensor-parallel rank."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.module import MegatronModule

    class SqueezeModule(MegatronModule):
        def __init__(self, config, **_):
            super().__init__(config=config)
            options = dict(config=config, init_method=config.init_method, bias=False, skip_bias_add=True)
            self.down = ColumnParallelLinear(config.hidden_size, size, gather_output=False, **options)
            self.up = RowParallelLinear(size, config.hidden_size, input_is_parallel=True, **options)

        def forward(self, hidden: Tensor, **_) -> tuple[Tensor, None]:
            narrow, _ = self.down(hidden)
            return self.up(torch.tanh(narrow))

    return SqueezeModule


def read(config: dict[str, Any]) -> Network:
    attention = DENSE[0](config["heads"], num_query_groups=config["groups"], head_dim=config["head_dim"])
    return Network(
        transformer(config["layers"], [attention, Squeeze(config["bottleneck"])]),
        hidden_size=config["hidden"],
        vocab_size=config["vocab"],
        padded_vocab_size=pad_vocab(config["vocab"]),
        max_positions=64,
    )


def write(network: Network) -> dict[str, Any]:
    attention, squeeze = network.sublayers[:2]
    return {
        "layers": len(network.layers),
        "heads": attention.num_heads,
        "groups": attention.num_query_groups,
        "head_dim": attention.head_dim,
        "bottleneck": squeeze.bottleneck_size,
        "hidden": network.hidden_size,
        "vocab": network.vocab_size,
    }


def plug_in() -> None:
    register(Squeeze)
    register_family("toy", Family("ToyForCausalLM", read, write))


if not type(__spec__.loader).__module__.startswith("_pytest"):
    # Imported as a plugin, or by a rank. Where pytest collects it, other tests would see the kind.
    plug_in()


@contextmanager
def plugged() -> Iterator[None]:
    """The kind and its family are known for a while."""
    plug_in()
    yield
    del KINDS[Squeeze.symbol], FAMILIES["toy"]
    for name in (Squeeze.name, BOTTLENECK.name):
        del axes._registered[name]


@pytest.fixture(scope="module", autouse=True)
def plugged_in() -> Iterator[None]:
    with plugged():
        yield


CONFIG = {"layers": 4, "heads": 4, "groups": 2, "head_dim": 8, "bottleneck": 12, "hidden": 32, "vocab": 64}


class Toy(nn.Module):
    """The Hugging Face class of the family."""

    def __init__(self, layers: int, heads: int, groups: int, head_dim: int, bottleneck: int, hidden: int, vocab: int):
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab, hidden)
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.model.layers:
            layer.input_layernorm, layer.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
            layer.self_attn, layer.squeeze = nn.Module(), nn.Module()
            for name, rows in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
                setattr(layer.self_attn, name, nn.Linear(hidden, rows * head_dim, bias=False))
            layer.self_attn.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
            layer.squeeze.down = nn.Linear(hidden, bottleneck, bias=False)
            layer.squeeze.up = nn.Linear(bottleneck, hidden, bias=False)
        self.model.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self.narrow: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        x, length = self.model.embed_tokens(tokens), tokens.size(1)
        self.narrow = []
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

        def turned(y: Tensor, count: int) -> Tensor:
            y = y.unflatten(-1, (count, self.head_dim)).transpose(1, 2)
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat([-second, first], dim=-1) * sin

        for layer in self.model.layers:
            own, y = layer.self_attn, layer.input_layernorm(x)
            values = own.v_proj(y).unflatten(-1, (self.groups, self.head_dim)).transpose(1, 2)
            queries, keys = turned(own.q_proj(y), self.heads), turned(own.k_proj(y), self.groups)
            context = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            x = x + own.o_proj(context.transpose(1, 2).flatten(2))
            self.narrow.append(torch.tanh(layer.squeeze.down(layer.norm2(x))))
            x = x + layer.squeeze.up(self.narrow[-1])
        return self.lm_head(self.model.norm(x))


def make_toy() -> Toy:
    """A model that has learned which eight letters there are, the same one at every call."""
    return copy.deepcopy(_trained_toy())


@functools.cache
def _trained_toy() -> Toy:
    torch.manual_seed(0)
    toy = Toy(**CONFIG)
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    optimizer = torch.optim.AdamW(toy.parameters(), lr=1e-2)
    for _ in range(30):
        tokens = torch.randint(0, 8, (4, 16))
        loss = nn.functional.cross_entropy(toy(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    toy.narrow = []
    return toy


def save_toy(folder: Path, toy: Toy) -> Path:
    """A Hugging Face folder of the family, with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    save_file(toy.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **CONFIG}))
    vocab = {chr(48 + i): i for i in range(CONFIG["vocab"] - 1)} | {"<eos>": CONFIG["vocab"] - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": CONFIG["vocab"] - 1}))
    return folder


def prepare(folder: Path) -> Path:
    """Imported, scored and pruned by the command."""
    save_toy(folder / "hf", make_toy())
    generator = torch.Generator().manual_seed(3)
    lines = ["".join(chr(48 + int(i)) for i in torch.randint(0, 8, (80,), generator=generator)) for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    run(folder, "import", "source=hf", "output=imported")
    run(folder, "score", "checkpoint=imported", "output=scores", "num_samples=8", "dtype=fp32", *data(folder))
    run(folder, "prune", "checkpoint=imported", "scores=scores", "output=pruned", "target.bottleneck=8")
    return folder


def data(folder: Path) -> list[str]:
    return [f"data.text=[{folder}/text.jsonl]", f"data.cache_dir={folder}/corpora", "data.sequence_length=16"]


def run(folder: Path, verb: str, *settings: str) -> None:
    """A verb of the command, with paths below a folder."""
    paths = ("source", "output", "checkpoint", "scores", "teacher", "student", "model", "path")
    own = []
    for setting in settings:
        name, _, value = setting.partition("=")
        own.append(f"{name}={folder}/{value}" if name in paths else setting)
    assert main([verb, f"plugins=[{PLUGIN}]", *own]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("toy"))


def test_it_is_imported_counted_and_pruned_by_the_command(folder):
    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.model.count import forward_flops_per_token, num_parameters

    imported, pruned = Checkpoint(folder / "imported"), Checkpoint(folder / "pruned")
    assert imported.network == read(CONFIG) and imported.network.pattern == "*B*B*B*B"
    assert num_parameters(imported.network) == sum(p.numel() for p in make_toy().parameters())
    smaller = read({**CONFIG, "bottleneck": 8})
    assert pruned.network == smaller
    assert num_parameters(smaller) == sum(p.numel() for p in Toy(**{**CONFIG, "bottleneck": 8}).parameters())
    lost = 2 * 4 * 2 * 32 * 4  # two operations for each of two matrices' 4 x 32 weights, in four layers
    assert forward_flops_per_token(imported.network, 16) - forward_flops_per_token(smaller, 16) == lost


def test_scores_are_those_of_its_activations(folder):
    """Mean over tokens, L2 over sequences, of what the second projection reads."""
    from minitron_megatron.pruning.scores import Scores

    scores, toy = Scores.read(folder / "scores"), make_toy()
    assert [tuple(values.shape) for values in scores.elements["bottleneck"]] == [(12,)] * 4
    plan = json.loads((folder / "pruned" / "plan.json").read_text())
    assert [row["kind"] for row in plan["sublayers"]] == list("*B*B*B*B")
    kept = plan["sublayers"][1]["bottleneck"]
    from minitron_megatron.pruning.ranges import from_ranges

    best = scores.elements["bottleneck"][0].argsort(descending=True)[:8].sort().values
    assert from_ranges(kept, 12) == best.tolist()
    from minitron_megatron.config.schema import DataConfig
    from minitron_megatron.data.samples import training_samples
    from minitron_megatron.data.tokens import prepare_corpus

    config = DataConfig([str(folder / "text.jsonl")], str(folder / "corpora"), sequence_length=16)
    corpus = prepare_corpus(config, folder / "hf")
    samples = training_samples(corpus, config, 8)
    tokens = torch.stack([samples[index]["tokens"] for index in range(8)])
    with torch.no_grad():
        toy(tokens)
    for number, narrow in enumerate(toy.narrow):
        expected = narrow.double().abs().mean(1).square().sum(0).sqrt()
        torch.testing.assert_close(scores.elements["bottleneck"][number], expected, rtol=1e-5, atol=0)


def test_what_is_exported_is_what_was_cut(folder):
    """The exported folder, in the family's own class, is the original with the dropped channels silenced."""
    run(folder, "export", "checkpoint=pruned", "output=exported")
    config = json.loads((folder / "exported" / "config.json").read_text())
    assert config["model_type"] == "toy" and config["bottleneck"] == 8
    smaller = Toy(**{name: config[name] for name in CONFIG})
    smaller.load_state_dict(load_file(folder / "exported" / "model.safetensors"), strict=True)
    from minitron_megatron.pruning.plan import Plan

    plan, toy = Plan.read(folder / "pruned"), make_toy()
    with torch.no_grad():
        for number, layer in enumerate(toy.model.layers):
            gone = sorted(set(range(12)) - set(plan.elements[2 * number + 1]["bottleneck"]))
            layer.squeeze.up.weight[:, gone] = 0
        tokens = torch.randint(0, 63, (2, 16), generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(smaller(tokens), toy(tokens), rtol=1e-5, atol=1e-5)
    run(folder, "import", "source=exported", "output=again")


def test_it_is_inspected(folder, capsys):
    run(folder, "inspect", "path=pruned")
    shown = capsys.readouterr().out
    assert "squeeze.bottleneck_size" in shown and "12" in shown and "8" in shown


def test_a_kind_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="Squeeze cannot be registered: its symbol and name and setting bottleneck"):
        register(dataclasses.dataclass(frozen=True)(type("Squeeze", (Squeeze,), {"__module__": __name__})))
