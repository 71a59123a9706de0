"""Reads Hugging Face folders as sources of weights, and writes any source as a Hugging Face folder."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open

from minitron_megatron.artifacts.files import read_json
from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.artifacts.output import writing
from minitron_megatron.checkpoint.hf_assets import HF_ASSETS, original_config, read_config
from minitron_megatron.checkpoint.model_card import CARD
from minitron_megatron.checkpoint.row_io import bits, copy_rows
from minitron_megatron.checkpoint.safetensors_writer import Tensor, cut_into_shards, write_shards
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.disk import convert_enospc
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.axes import Param, Part
from minitron_megatron.model.families import config_from_network, network_from_config
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import parameters
from minitron_megatron.parallel.workers import Workers, join_workers

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHOWN_PROBLEMS = 10
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class StoredTensor(Protocol):
    """A tensor on disk: its size, the name of its number format in the file, and the dtype of what `read` returns.

    The dtype is None where the format is not supported.
    """

    @property
    def size(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype | None: ...

    def read(self, index: list[np.ndarray]) -> torch.Tensor: ...


@dataclass(frozen=True)
class _SafeTensor:
    """A tensor in a safetensors file, with the offset `start`, and `kind`, the file's name of its dtype.

    It is read directly, because safetensors would map the file into memory, and mapped pages count as used.
    """

    path: Path
    start: int
    size: tuple[int, ...]
    kind: str

    @property
    def dtype(self) -> torch.dtype | None:
        return _DTYPES.get(self.kind)

    def read(self, index: list[np.ndarray]) -> torch.Tensor:
        out = torch.empty([len(i) for i in index], dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            copy_rows(file, self.start, self.size, index, bits(out))
        return out


class HuggingFaceTensors:
    """Tensors on disk with Hugging Face names, as a source of weights that is read row by row.

    Raises:
        CheckpointError: a tensor is missing, of another size than the network says, or unknown.
    """

    def __init__(self, path: Path, network: Network, tensors: Mapping[str, StoredTensor]):
        self.path = path
        self.network = network
        self._tensors = tensors
        dtypes = self._check()
        first = parameters(network)[0]
        self.dtype = dtypes[first.hf_name(first.parts[0])]

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`. Rows that pad the vocabulary are zero."""
        rows, columns = index[0], index[1:]
        out = torch.zeros([len(i) for i in index], dtype=self.dtype)
        for part in param.parts:
            # Row i of this tensor is row `fused[i]` of Megatron's.
            fused = param.hf_rows(part, self.network.vocab_size)
            _, where, own = np.intersect1d(rows, fused, assume_unique=True, return_indices=True)
            if not len(own):
                continue
            piece = self._tensors[param.hf_name(part)].read([own, *columns])
            out[torch.from_numpy(where)] = piece.to(self.dtype)
        return out

    def _check(self) -> dict[str, torch.dtype]:
        """Checks the tensors against the network's, and returns the dtype of each."""
        expected = {name: size for name, size, *_ in hf_tensors(self.network)}
        problems = []
        dtypes: dict[str, torch.dtype] = {}
        for name, size in expected.items():
            if (tensor := self._tensors.get(name)) is None:
                problems.append(f"missing: {name} {size}")
            elif list(tensor.size) != size:
                problems.append(f"wrong size: {name} is {list(tensor.size)}, the config says {size}")
            elif (dtype := tensor.dtype) is None:
                problems.append(f"unknown number format: {name} is {tensor.kind}")
            else:
                dtypes[name] = dtype
        ignored = {*expected, "lm_head.weight"} if self.network.tie_embeddings else set(expected)
        unknown = [name for name in self._tensors if name not in ignored and "rotary_emb.inv_freq" not in name]
        problems += [f"unknown: {name}" for name in unknown]
        if problems:
            shown = problems[:_SHOWN_PROBLEMS]
            if len(problems) > len(shown):
                shown.append(f"and {len(problems) - len(shown)} more")
            raise CheckpointError(f"{self.path} does not hold the network of its config:\n  " + "\n  ".join(shown))
        return dtypes


class HuggingFaceFolder(HuggingFaceTensors):
    """A Hugging Face folder with one or more safetensors files, as a source of weights.

    Raises:
        CheckpointError: a file or tensor is missing, cut short, of another size than the config says, or unknown.
        UnsupportedModelError: the family is not supported.
    """

    def __init__(self, folder: Path):
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} is not a Hugging Face folder: it has no config.json")
        config = read_config(folder)
        try:
            network = network_from_config(config)
        except (KeyError, TypeError, AttributeError, ArithmeticError) as e:
            raise CheckpointError(f"{folder / 'config.json'} is not the whole config of a model: {e!r}") from e
        names = _weight_files(folder)
        there = {file: _tensors_in(folder / file) for file in set(names.values())}
        super().__init__(folder, network, {n: there[file][n] for n, file in names.items() if n in there[file]})


def hf_tensors(network: Network) -> Iterator[tuple[str, list[int], Param, Part]]:
    """Yields every tensor of the Hugging Face layout: name, size, and the parameter and part that it is."""
    for param in parameters(network):
        for part in param.parts:
            yield param.hf_name(part), param.hf_shape(part, network.vocab_size), param, part


def read_hf_tensor(
    source: TensorSource, param: Param, part: Part, low: int = 0, high: int | None = None
) -> torch.Tensor:
    """Reads a tensor of the Hugging Face layout, or its rows `low:high`, from any source."""
    rows = param.hf_rows(part, source.network.vocab_size)[low:high]
    columns = [np.arange(n) for n in param.shape[1:]]
    return source.read(param, [rows, *columns])


def write_huggingface(
    output: Path, source: TensorSource, hf_assets: Path, max_shard_bytes: float, manifest: Manifest, card: str
) -> None:
    """Writes a network as a Hugging Face folder, a block of rows at a time. Collective.

    The folder is written atomically. The ranks that torchrun or srun started share its weight files; each calls this
    with an equal source.

    Args:
        output: the folder to make.
        source: of the weights, read by several threads.
        hf_assets: folder with the tokenizer and, if there is one, the original `config.json`.
        max_shard_bytes: largest size of one safetensors file, unless one tensor alone is larger.
        manifest: of the result; its network is set here.
        card: text of its `README.md`.

    Raises:
        DiskSpaceError: the disk is full, or becomes full.
        LostWorkerError: another rank was killed.
    """
    config = config_from_network(source.network, original_config(hf_assets))
    # transformers 5 writes `dtype`; earlier readers know `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = str(source.dtype).removeprefix("torch.")
    config["transformers_version"] = transformers.__version__
    tensors = [
        Tensor(name, tuple(size), partial(read_hf_tensor, source, param, part))
        for name, size, param, part in hf_tensors(source.network)
    ]
    shards = cut_into_shards(tensors, source.dtype, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]

    def write_share(folder: Path, workers: Workers) -> None:
        share = list(zip(names, shards, strict=True))[workers.rank :: workers.size]
        with convert_enospc(output):
            write_shards({folder / name: shard for name, shard in share}, source.dtype)

    def write_rest(folder: Path) -> None:
        for name in HF_ASSETS:
            if (hf_assets / name).is_file():
                shutil.copy(hf_assets / name, folder / name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / CARD).write_text(card)
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    manifest.network = source.network.to_dict()
    num_bytes = sum(tensor.num_bytes(source.dtype) for tensor in tensors)
    with join_workers() as workers, writing(output, manifest, num_bytes, workers) as folder:
        workers.run(lambda: write_share(folder, workers))
        workers.run_on_main(lambda: write_rest(folder))


def _tensors_in(path: Path) -> dict[str, _SafeTensor]:
    """Returns the tensors of a safetensors file by name. Opening it checks that it is complete."""
    try:
        with safe_open(path, framework="pt"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except IsADirectoryError as e:
        raise CheckpointError(f"{path} is a folder and should be a safetensors file") from e
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} is missing: the folder is not whole") from e
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} is not a whole safetensors file: {e}") from e
    entries.pop("__metadata__", None)
    return {
        name: _SafeTensor(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in entries.items()
    }


def _weight_files(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX, "a whole index of weights").get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise CheckpointError(f"{folder / INDEX} is not a whole index of weights: weight_map must name files")
        return files
    if not (folder / SINGLE).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}: only safetensors weights are read")
    return dict.fromkeys(_tensors_in(folder / SINGLE), SINGLE)
