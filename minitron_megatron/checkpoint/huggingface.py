"""Hugging Face folders as sources of weights, and any source as a Hugging Face folder."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minitron_megatron.checkpoint.source import TensorSource, instances, take
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.axes import Param, Part, axis_sizes, parameters
from minitron_megatron.model.families import config_from_shape, shape_from_config
from minitron_megatron.model.shape import ModelShape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHOWN_PROBLEMS = 10
# What travels beside the weights, where it is there. Weights and code never do.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class HuggingFaceFolder:
    """A Hugging Face folder (one or many safetensors files) as a source of weights, read row by row.

    Raises:
        CheckpointError: a file or tensor is missing, cut short, of another size than the config says, or unknown.
        UnsupportedModelError: the family is not supported.
    """

    def __init__(self, folder: Path):
        config = folder / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{folder} is not a Hugging Face folder: it has no config.json")
        self.folder = folder
        try:
            self.shape = shape_from_config(json.loads(config.read_text()))
        except (json.JSONDecodeError, KeyError) as e:
            raise CheckpointError(f"{config} is not the whole config of a model: {e!r}") from e
        names = _weight_files(folder)
        files = {file: _open(folder / file) for file in set(names.values())}
        there = {file: set(opened.keys()) for file, opened in files.items()}
        self._files = {name: files[file] for name, file in names.items() if name in there[file]}
        self._check()
        first = self._files["model.embed_tokens.weight"].get_slice("model.embed_tokens.weight")
        self.dtype = _SAFETENSORS_DTYPES[first.get_dtype()]

    def read(self, param: Param, layer: int | None, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`. Rows that pad the vocabulary are zero."""
        rows, columns = index[0], index[1:]
        out = torch.zeros([len(i) for i in index], dtype=self.dtype)
        for part in param.parts:
            # Row i of this tensor is row `fused[i]` of Megatron's.
            fused = _true_rows(param, part, self.shape)
            _, where, own = np.intersect1d(rows, fused, assume_unique=True, return_indices=True)
            if not len(own):
                continue
            name = part.name.format(layer=layer)
            low, high = int(own.min()), int(own.max()) + 1
            piece = self._files[name].get_slice(name)[low:high]
            out[torch.from_numpy(where)] = take(piece, [own - low, *columns]).to(self.dtype)
        return out

    def _check(self) -> None:
        expected = {name: size for name, size, *_ in hf_tensors(self.shape)}
        problems = []
        for name, size in expected.items():
            if name not in self._files:
                problems.append(f"missing: {name} {size}")
            elif (found := self._files[name].get_slice(name).get_shape()) != size:
                problems.append(f"wrong size: {name} is {found}, config.json says {size}")
        ignored = {"lm_head.weight"} if self.shape.tied else set()
        unknown = [n for n in self._files if n not in expected and n not in ignored and "rotary_emb.inv_freq" not in n]
        problems += [f"unknown: {name}" for name in unknown]
        if problems:
            shown = problems[:_SHOWN_PROBLEMS]
            if len(problems) > len(shown):
                shown.append(f"and {len(problems) - len(shown)} more")
            raise CheckpointError(f"{self.folder} does not hold the network of its config:\n  " + "\n  ".join(shown))


class StateDict:
    """Weights in memory under Hugging Face names, as a source."""

    def __init__(self, shape: ModelShape, tensors: Mapping[str, torch.Tensor]):
        self.shape = shape
        self.tensors = tensors
        self.dtype = tensors["model.embed_tokens.weight"].dtype

    def read(self, param: Param, layer: int | None, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`. Rows that pad the vocabulary are zero."""
        whole = torch.zeros(param.size(axis_sizes(self.shape)), dtype=self.dtype)
        for part in param.parts:
            whole[torch.from_numpy(_true_rows(param, part, self.shape))] = self.tensors[part.name.format(layer=layer)]
        return take(whole, index)


def hf_tensors(shape: ModelShape) -> Iterator[tuple[str, list[int], Param, Part, int | None]]:
    """Every tensor of the Hugging Face layout: name, size, and the row of the axis table it lies in."""
    sizes = axis_sizes(shape)
    for param in parameters(shape):
        for layer in instances(param, shape):
            for part in param.parts:
                rows = len(_true_rows(param, part, shape))
                yield part.name.format(layer=layer), [rows, *param.size(sizes)[1:]], param, part, layer


def read_hf_tensor(source: TensorSource, param: Param, part: Part, layer: int | None) -> torch.Tensor:
    """One tensor of the Hugging Face layout, out of any source."""
    columns = [np.arange(n) for n in param.size(axis_sizes(source.shape))[1:]]
    return source.read(param, layer, [_true_rows(param, part, source.shape), *columns])


def write_huggingface(folder: Path, source: TensorSource, companions: Path, max_shard_bytes: float) -> None:
    """Write a network as a Hugging Face folder, one tensor at a time.

    Args:
        folder: an existing empty folder.
        source: where the weights come from.
        companions: folder with the tokenizer and the original `config.json`.
        max_shard_bytes: largest size of one safetensors file, unless one tensor alone is larger.
    """
    for name in COMPANIONS:
        if (companions / name).is_file():
            shutil.copy(companions / name, folder / name)
    original = json.loads((companions / "config.json").read_text())
    config = config_from_shape(source.shape, original)
    # transformers 5 writes `dtype`; earlier readers know `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = str(source.dtype).removeprefix("torch.")
    config["transformers_version"] = transformers.__version__
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    itemsize = source.dtype.itemsize
    shards: list[list] = [[]]
    filled = 0
    for entry in hf_tensors(source.shape):
        size = itemsize * math.prod(entry[1])
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: read_hf_tensor(source, p, part, layer).contiguous() for name, _, p, part, layer in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer and config, the small files beside the weights, into a new folder."""
    target.mkdir(parents=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def _true_rows(param: Param, part: Part, shape: ModelShape) -> np.ndarray:
    """Rows of Megatron's tensor that make up `part`, without those that pad the vocabulary."""
    sizes = axis_sizes(shape)
    kept = dict(part.kept)
    if param.split == "vocab":
        kept["vocab"] = np.arange(shape.vocab)
    return param.dims[0].index(kept, sizes)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} is missing: the folder is not whole") from e
    except SafetensorError as e:
        raise CheckpointError(f"{path} is not a whole safetensors file: {e}") from e


def _weight_files(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        try:
            return json.loads((folder / INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as e:
            raise CheckpointError(f"{folder / INDEX} is not a whole index of weights: {e!r}") from e
    if not (folder / SINGLE).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}: only safetensors weights are read")
    return dict.fromkeys(_open(folder / SINGLE).keys(), SINGLE)


_SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
