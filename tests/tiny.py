"""Tiny networks whose sizes are all different, so that a swapped axis shows."""

import dataclasses
import json
import random
from itertools import cycle
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.config.schema import ImportConfig
from minitron_megatron.model.network import Network
from minitron_megatron.pruning.scores import Scores, scored_axes

LLAMA = dict(
    model_type="llama",
    num_hidden_layers=4,
    hidden_size=48,
    intermediate_size=44,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    vocab_size=101,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    tie_word_embeddings=False,
)
NEMOTRON = {
    **{k: v for k, v in LLAMA.items() if k != "rms_norm_eps"},
    "model_type": "nemotron",
    "norm_eps": 1e-5,
    "hidden_act": "relu2",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": None}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
SEED_OSS = {**LLAMA, "model_type": "seed_oss", "attention_bias": True, "residual_dropout": 0.0}
QWEN3 = {**LLAMA, "model_type": "qwen3"}
FAMILIES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "nemotron": NEMOTRON,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "seed_oss": SEED_OSS,
}
# Of each kind of network one: a Mistral's is a Llama's, and a Seed-OSS's a Qwen2's.
NETWORKS = {family: FAMILIES[family] for family in ("llama", "nemotron", "qwen2", "qwen3")}


def hf_model(seed: int = 0, **settings):
    """A random float32 transformers model whose norms and biases are not trivial."""
    torch.manual_seed(seed)
    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual 0.02, so that attention and activations are far from linear.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write_gguf(path, model, formats=("F32",), scaling=None, name=None, scaling_type=None, keys=None):
    """A GGUF file as llama.cpp's converter makes it of a transformers model, its matrices in turn in some formats."""
    import gguf

    config, family = model.config, "llama" if model.config.model_type == "mistral" else model.config.model_type
    [architecture] = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_name(name or config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    rotated = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(rotated * config.head_dim))
    writer.add_key_length(config.head_dim)
    if scaling_type is not None:
        writer.add_string(f"{family}.rope.scaling.type", scaling_type)
    for key, value in (keys or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        writer.kv_data[0].pop(key, None)
        add(key, value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "ab", *(chr(97 + i) for i in range(config.vocab_size - 3))])
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    formats = cycle(formats)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, kind = name.rsplit(".", 1)
        values = tensor.numpy()
        if family == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        if family == "nemotron" and name.endswith("norm.weight"):
            values = values + 1
        kind_of = gguf.GGMLQuantizationType[next(formats) if values.ndim == 2 else "F32"]
        writer.add_tensor(f"{names.get_name(module)}.{kind}", gguf.quantize(values, kind_of), raw_dtype=kind_of)
    if scaling is not None:
        writer.add_tensor("rope_freqs.weight", scaling)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def literate(model, letters: str = "abcdefgh"):
    """The model, trained until it has learned which letters there are, in the vocabulary of `save_hf`."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        choice = torch.randint(len(letters), (4, 16), generator=generator)
        tokens = torch.tensor([ord(letter) - 33 for letter in letters])[choice]
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    assert loss < 2.5  # of a choice among eight, in nats: 2.08
    return model


def save_hf(folder: Path, model) -> Path:
    """A Hugging Face folder with the model and a tokenizer of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model.save_pretrained(folder)
    vocab = {chr(33 + i): i for i in range(model.config.vocab_size - 1)} | {"<eos>": model.config.vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def import_hf(folder: Path, model) -> Path:
    """The model as a Megatron checkpoint below `folder`."""
    from minitron_megatron.checkpoint.convert import import_checkpoint

    source = save_hf(folder / "hf", model)
    return import_checkpoint(ImportConfig(str(source), str(folder / "checkpoint")))


def changed(network: Network, num_layers: int | None = None, **fields) -> Network:
    """A network with other sizes or switches, of itself or of all sublayers that have a field of that name."""
    own = {name: fields.pop(name) for name in list(fields) if name in Network.__dataclass_fields__}
    sublayers = []
    for sublayer in network.sublayers:
        changes = {name: value for name, value in fields.items() if name in sublayer.__dataclass_fields__}
        sublayers.append(dataclasses.replace(sublayer, **changes))
    assert all(any(name in one.__dataclass_fields__ for one in network.sublayers) for name in fields)
    if num_layers is not None:
        sublayers = sublayers[: len(network.layers[0])] * num_layers
    return network.replace(sublayers=tuple(sublayers), **own)


def without_sublayers(network: Network, *positions: int) -> Network:
    """A network that has lost some sublayers."""
    left = [sublayer for position, sublayer in enumerate(network.sublayers) if position not in positions]
    return network.replace(sublayers=tuple(left))


def unlike(network: Network) -> Network:
    """A network of four dense layers with sizes of its own in each, one attention and one MLP missing.

    All sizes divide by two tensor ranks.
    """
    attention, mlp = network.sublayers[:2]
    heads = [(6, 2), (4, 2), (2, 2), (8, 4)]
    sublayers = []
    for number, (num_heads, groups) in enumerate(heads):
        sublayers.append(dataclasses.replace(attention, num_heads=num_heads, num_query_groups=groups))
        sublayers.append(dataclasses.replace(mlp, ffn_hidden_size=44 - 8 * number))
    return without_sublayers(network.replace(sublayers=tuple(sublayers)), 2, 5)


def scores_by_chance(network: Network, checkpoint: str | None = None, seed: int = 1) -> Scores:
    """Scores that are not those of any data, of a network of any layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    hidden = draw(network.hidden_size)
    elements = {
        axis.setting: [draw(*network.sublayers[p].score_shape(axis)) for p in network.positions(kind)]
        for kind, axis in scored_axes(network)
    }
    return Scores(network, hidden, elements, {"loss": draw(len(network.layers))}, checkpoint=checkpoint)


def random_scores(folder: Path, network: Network, checkpoint: str | None = None) -> None:
    """Scores that are not those of any data, written to `folder`."""
    folder.mkdir()
    scores_by_chance(network, checkpoint).write(folder)
    Manifest("scores").write(folder)


class Samples:
    """Random sequences as a dataset, with masked tokens in some and one masked altogether."""

    def __init__(self, num_samples: int, sequence_length: int, vocab: int, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, vocab, (num_samples, sequence_length + 1), generator=generator)
        self.mask = (torch.rand(num_samples, sequence_length, generator=generator) > 0.3).float()
        self.mask[1] = 0
        self.mask[2] = 1

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        length = self.mask.size(1)
        return {
            "tokens": self.tokens[index, :-1],
            "labels": self.tokens[index, 1:],
            "loss_mask": self.mask[index],
            "position_ids": torch.arange(length),
        }


def tiny_inputs(folder: Path) -> Path:
    """A model in `folder/source`, and a text that its tokenizer knows all letters of, `folder/text.jsonl`."""
    save_hf(folder / "source", literate(hf_model(**LLAMA)))
    choose = random.Random(0)
    lines = ["".join(choose.choice("abcdefgh") for _ in range(80)) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder
