"""Reads Hugging Face folders as sources of weights, and writes any source as a Hugging Face folder."""

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.artifacts.output import writing
from minitron_megatron.checkpoint.hf_assets import HF_ASSETS, original_config, read_config
from minitron_megatron.checkpoint.hf_names import (
    embedding_name,
    hf_tensors,
    output_name,
    with_family_prefix,
    with_tie,
)
from minitron_megatron.checkpoint.model_card import CARD
from minitron_megatron.checkpoint.packed import Packed
from minitron_megatron.checkpoint.recognise import adapter_in, folder_hint, merge_first
from minitron_megatron.checkpoint.safetensors_writer import Tensor, cut_into_shards, write_shards
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.checkpoint.stored_tensors import SafeTensor, StoredTensor, dequantized, tensors_in
from minitron_megatron.checkpoint.tokenizer_files import keep_tokens
from minitron_megatron.disk import convert_enospc
from minitron_megatron.errors import CheckpointError, UnsupportedModelError
from minitron_megatron.files import read_json
from minitron_megatron.model.axes import Param, Part
from minitron_megatron.model.families import Config, config_from_network, network_from_config
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.workers import Workers, join_workers

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHOWN_PROBLEMS = 10

logger = logging.getLogger(__name__)


class HuggingFaceTensors:
    """Tensors on disk with Hugging Face names, as a source of weights that is read row by row.

    Raises:
        CheckpointError: a tensor is missing, of another size than the network says, or unknown.
    """

    def __init__(self, path: Path, network: Network, tensors: Mapping[str, StoredTensor]):
        self.path = path
        tensors, self._prefix = with_family_prefix(network, tensors)
        self.network, self._tensors = with_tie(path, network, tensors)
        self._dtypes = self._check()
        if self._prefix:
            logger.warning("%s: %s: read as the same network", path, self._prefix)
        self.dtype = self._dtypes[embedding_name(self.network)]

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

    def say_casts(self) -> None:
        """Warns of tensors whose number format in the files is another than the one they are read in."""
        others: dict[torch.dtype, list[str]] = {}
        for name, dtype in self._dtypes.items():
            if dtype is not self.dtype:
                others.setdefault(dtype, []).append(name)
        for dtype, names in others.items():
            is_exact = torch.promote_types(dtype, self.dtype) is self.dtype
            logger.warning(
                "%s: %d tensors are %s (%s, ...) and are written as %s, the number format of the embeddings, since a "
                "checkpoint has one%s",
                self.path,
                len(names),
                _name(dtype),
                names[0],
                _name(self.dtype),
                "" if is_exact else ": digits are lost; dtype=fp32 keeps them",
            )

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
        output = output_name(self.network)
        if output in expected and output not in self._tensors:
            problems.append(f"if {output} is tied to the embeddings, set tie_word_embeddings to true in config.json")
        known = {*expected, output} if self.network.tie_embeddings else set(expected)  # a tied output has equal values
        unknown = [name for name in self._tensors if name not in known and "rotary_emb.inv_freq" not in name]
        problems += [f"unknown: {name}" for name in unknown]
        if problems:
            shown = problems[:_SHOWN_PROBLEMS]
            if len(problems) > len(shown):
                shown.append(f"and {len(problems) - len(shown)} more")
            if self._prefix:
                shown.append(self._prefix)
            raise CheckpointError(f"{self.path} does not hold the network of its config:\n  " + "\n  ".join(shown))
        return dtypes


class HuggingFaceFolder(HuggingFaceTensors):
    """A Hugging Face folder with one or more safetensors files, as a source of weights.

    Raises:
        CheckpointError: a file or tensor is missing, cut short, of another size than the config says, or unknown.
        UnsupportedModelError: the family is not supported.
    """

    def __init__(self, folder: Path, max_positions: int | None = None):
        if not (folder / "config.json").is_file():
            hint = folder_hint(folder) if folder.is_dir() else ""
            raise CheckpointError(f"{folder} is not a Hugging Face folder: it has no config.json{hint and f'; {hint}'}")
        if adapter := adapter_in(folder):
            raise CheckpointError(f"{folder}: {merge_first(adapter)}")
        config = read_config(folder)
        try:
            network = network_from_config(config, max_positions)
        except (KeyError, TypeError, AttributeError, ArithmeticError) as e:
            raise CheckpointError(f"{folder / 'config.json'} is not the whole config of a model: {e!r}") from e
        super().__init__(folder, network, dequantized(_stored_tensors(folder), config))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_hf_tensor(
    source: TensorSource, param: Param, part: Part, low: int = 0, high: int | None = None
) -> torch.Tensor:
    """Reads a tensor of the Hugging Face layout, or its rows `low:high`, from any source."""
    rows = param.hf_rows(part, source.network.vocab_size)[low:high]
    columns = [np.arange(n) for n in param.shape[1:]]
    return source.read(param, [rows, *columns])


def write_huggingface(
    output: Path,
    source: TensorSource,
    hf_assets: Path,
    max_shard_bytes: float,
    manifest: Manifest,
    card: str,
    packed: Packed | None = None,
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
        packed: the source's tensors, packed; None to write them as they are.

    Raises:
        DiskSpaceError: the disk is full, or becomes full.
        LostWorkerError: another rank was killed.
    """
    config, tensors = _config_and_tensors(source, hf_assets, packed)
    shards = cut_into_shards(tensors, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]

    def write_share(folder: Path, workers: Workers) -> None:
        share = list(zip(names, shards, strict=True))[workers.rank :: workers.size]
        with convert_enospc(output):
            write_shards({folder / name: shard for name, shard in share})

    def write_rest(folder: Path) -> None:
        for name in HF_ASSETS:
            if (hf_assets / name).is_file():
                shutil.copyfile(hf_assets / name, folder / name)  # without its mode, for it may be read-only
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        keep_tokens(hf_assets, folder)
        (folder / CARD).write_text(card, encoding="utf-8")
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    manifest.network = source.network.to_dict()
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    with join_workers() as workers, writing(output, manifest, num_bytes, workers) as folder:
        workers.run(lambda: write_share(folder, workers))
        workers.run_on_main(lambda: write_rest(folder))


def _config_and_tensors(source: TensorSource, hf_assets: Path, packed: Packed | None) -> tuple[Config, list[Tensor]]:
    """Returns the content of `config.json`, and the tensors to write; see `write_huggingface`."""
    config = config_from_network(source.network, original_config(hf_assets))
    _require_readable(config, source.network)
    # transformers 5 writes `dtype`; earlier readers know `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = str(source.dtype).removeprefix("torch.")
    config["transformers_version"] = transformers.__version__
    if packed:
        config["quantization_config"] = packed.config()
        return config, list(packed.tensors())
    return config, [
        Tensor(name, tuple(size), source.dtype, partial(read_hf_tensor, source, param, part))
        for name, size, param, part in hf_tensors(source.network)
    ]


def _require_readable(config: Config, network: Network) -> None:
    """Checks that transformers' own class reads an exported config as the same network.

    Raises:
        UnsupportedModelError: it does not.
    """
    if config["model_type"] not in transformers.CONFIG_MAPPING:
        return  # of a plug-in
    where = f"the config.json of this {config['model_type']} network"
    try:
        theirs = transformers.CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(config))  # they change it
    except Exception as e:  # classes check their fields in ways of their own
        raise UnsupportedModelError(f"{where} is refused by transformers {transformers.__version__}: {e}") from e
    read = network_from_config(theirs.to_dict()).replace(padded_vocab_size=network.padded_vocab_size)
    if read != network:
        raise UnsupportedModelError(f"{where} is another network to transformers {transformers.__version__}")


def _stored_tensors(folder: Path) -> dict[str, SafeTensor]:
    """Returns the tensors of a folder that transformers would load, by name."""
    if (folder / SINGLE).is_file():
        if _has_other_index(folder):
            logger.warning("%s: %s is read, and not the shards of %s, as transformers does", folder, SINGLE, INDEX)
        return tensors_in(folder / SINGLE)
    if not (folder / INDEX).is_file():
        hint = folder_hint(folder) or "only safetensors weights are read"
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}: {hint}")
    names = _weight_map(folder)
    there = {file: tensors_in(folder / file) for file in set(names.values())}
    return {name: there[file][name] for name, file in names.items() if name in there[file]}


def _has_other_index(folder: Path) -> bool:
    """Returns whether there is an index beside the single file, be it damaged, that names other files."""
    try:
        return (folder / INDEX).is_file() and set(_weight_map(folder).values()) != {SINGLE}
    except CheckpointError:
        return True


def _weight_map(folder: Path) -> dict[str, str]:
    files = read_json(folder / INDEX, "a whole index of weights").get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise CheckpointError(f"{folder / INDEX} is not a whole index of weights: weight_map must name files")
    return files
