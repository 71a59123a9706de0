"""Reads GGUF files as sources of weights, de-quantised a block of rows at a time.

    magic GGUF, uint32 version, uint64 tensors, uint64 values
    values:  text key, uint32 type, value
    tensors: text name, uint32 dimensions D, uint64 size [D], fastest first, uint32 type, uint64 offset
    data:    from the next multiple of the alignment, which is a value, on
    text:    uint64 length, bytes;  array: uint32 type, uint64 length, values

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import copy
import importlib.util
import math
import os
import struct
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from minitron_megatron.checkpoint.gguf_keys import Value, check_keys, check_whole
from minitron_megatron.checkpoint.hf_assets import read_config
from minitron_megatron.checkpoint.hf_names import hf_tensors
from minitron_megatron.checkpoint.huggingface import HuggingFaceTensors
from minitron_megatron.errors import CheckpointError, ConfigError, UnsupportedModelError, UserError
from minitron_megatron.model.families import FAMILIES, network_from_config
from minitron_megatron.model.network import Network

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from transformers import PretrainedConfig

_TEXT, _ARRAY = 8, 9
# Bytes of every other type: integers of 1, 2 and 4 bytes, float32, bool, integers of 8 bytes and float64.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FLOATS = {6: "<f", 12: "<d"}
_MAX_DIMENSIONS = 4
_MAX_NAME = 4096
_ROPE_FACTORS = "rope_freqs.weight"
# A file has only the effect of Llama 3.1's to 3.3's rotary scaling; these settings are the same in all of them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def open_gguf(path: Path, hf_assets: Path, max_positions: int | None = None) -> HuggingFaceTensors:
    """Opens a GGUF file as a source of weights, and writes its config and tokenizer as Hugging Face files.

    Args:
        path: of the file.
        hf_assets: folder for config and tokenizer.
        max_positions: longest sequence, where it is to be shorter than the file's.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: the packages that read such files are not installed.
        UnsupportedModelError: its family, its quantisation or its rotary scaling is not supported.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError([f"source = {path} is a GGUF file, which the demo extra reads: pip install -e '.[demo]'"])
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

    header = _read_header(path)
    check_whole(path, header.values)
    where = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name, trust_remote_code=False)
    try:
        settings, _ = PreTrainedConfig.get_config_dict(**where)
        family = settings["model_type"]
        if family not in FAMILIES:
            raise UnsupportedModelError(
                f"{path}: model_type = {family!r} is not supported: choose a model of one of "
                f"{', '.join(sorted(FAMILIES))}"
            )
        check_keys(path, header.values, header.architecture)
        if family == "llama" and settings["hidden_size"] % settings["num_attention_heads"]:
            # llama.cpp has one name for both families, and transformers' LlamaConfig refuses such a hidden size.
            settings["model_type"] = "mistral"
        config = AutoConfig.for_model(**settings)
        _complete(path, config, header, max_positions)
        if (scaling := header.of_model("rope.scaling.type")) not in (None, "none"):  # transformers never reads it
            raise UnsupportedModelError(f"{path}: rope.scaling.type = {scaling!r} is not supported: choose another one")
        if _ROPE_FACTORS in header.tensors:
            config.rope_parameters = _llama3_scaling(path, config, header.tensors.pop(_ROPE_FACTORS))
        config.save_pretrained(hf_assets)
        network = network_from_config(read_config(hf_assets), max_positions)
        if len(network.layers) > len(header.tensors):
            raise CheckpointError(
                f"{path} says that it has {len(network.layers)} layers, and holds {len(header.tensors)} tensors"
            )
        # AutoTokenizer would build the refused Llama config again; for Llama it returns the latter class anyway.
        tokenizer = AutoTokenizer if config.model_type == family else PreTrainedTokenizerFast
        tokenizer.from_pretrained(**where).save_pretrained(hf_assets)
        return HuggingFaceTensors(path, network, _by_hf_name(header, network))
    except UserError:
        raise
    except Exception as e:  # damaged files raise exceptions of many types
        raise CheckpointError(f"{path} cannot be read as a GGUF file: {e!r}") from e


def _complete(path: Path, config: "PretrainedConfig", header: "_Header", max_positions: int | None) -> None:
    """Sets what transformers does not read in the file, or for few families.

    Raises:
        UnsupportedModelError: heads have unlike sizes, or are rotated in part where the family has no such thing.
    """
    window, positions = header.of_model("attention.sliding_window"), max_positions or header.of_model("context_length")
    if config.model_type == "mistral":  # its config defaults to a sliding window
        config.sliding_window = window
    elif isinstance(window, int) and isinstance(positions, int) and 0 < window < positions:
        raise UnsupportedModelError(
            f"{path}: attention.sliding_window = {window} is not supported, being shorter than context_length = "
            f"{positions}: import with max_positions={window} if longer sequences are not needed"
        )
    heads = [header.of_model(f"attention.{name}_length") for name in ("key", "value")]
    if heads[0]:
        config.head_dim = heads[0]
    width = int(heads[0] or config.hidden_size // config.num_attention_heads)
    if heads[1] not in (None, width):
        raise UnsupportedModelError(
            f"{path}: attention.value_length = {heads[1]} is not supported, keys being of {width}: choose another model"
        )
    rotated = header.of_model("rope.dimension_count")
    if isinstance(rotated, int) and rotated != width:
        if "partial_rotary_factor" not in config.rope_parameters:
            raise UnsupportedModelError(
                f"{path}: rope.dimension_count = {rotated} is not supported for this family, heads being of {width}: "
                f"choose another model"
            )
        config.rope_parameters["partial_rotary_factor"] = rotated / width
    epsilon = header.of_model("attention.layer_norm_epsilon")
    if epsilon is not None and hasattr(config, "norm_eps"):
        config.norm_eps = epsilon


@dataclass(frozen=True)
class _QuantizedTensor:
    """A tensor in a GGUF file.

    Attributes:
        path: of the file.
        start: offset of its first byte.
        size: of the tensor.
        type: of quantisation.
        paired_heads: number of heads whose rows are interleaved for the rotary embedding: Hugging Face's row j of a
            head's first half is row 2 j in the file, and row j of the second half is row 2 j + 1. None for plain rows.
        added: constant that the converter added to the values.
    """

    path: Path
    start: int
    size: tuple[int, ...]
    type: "GGMLQuantizationType"
    paired_heads: int | None = None
    added: float = 0.0

    @property
    def kind(self) -> str:
        return self.type.name

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the de-quantised values: float32, or None if the type of quantisation is not supported."""
        try:
            self._dequantized(np.zeros((1, self._block[1]), np.uint8))
        except NotImplementedError:
            return None
        return torch.float32

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size[:-1]) * self._row_bytes

    def read(self, index: list[np.ndarray]) -> torch.Tensor:
        """Reads the values at rows and columns of `index`, or at its only dimension."""
        *rows, columns = index
        rows = self._in_file(rows[0]) if rows else np.zeros(1, np.int64)
        low, high = int(rows.min()), int(rows.max()) + 1
        with open(self.path, "rb") as file:
            file.seek(self.start + low * self._row_bytes)
            raw = np.fromfile(file, np.uint8, (high - low) * self._row_bytes).reshape(high - low, -1)
        values = self._dequantized(raw[rows - low])[:, columns] - np.float32(self.added)
        return torch.from_numpy(values if len(index) > 1 else values[0])

    def _in_file(self, rows: np.ndarray) -> np.ndarray:
        if self.paired_heads is None:
            return rows
        head_dim = self.size[0] // self.paired_heads
        head, row = np.divmod(rows, head_dim)
        half, pair = np.divmod(row, head_dim // 2)
        return head * head_dim + 2 * pair + half

    def _dequantized(self, raw: np.ndarray) -> np.ndarray:
        from gguf.quants import dequantize

        return dequantize(raw, self.type)

    @property
    def _block(self) -> tuple[int, int]:
        """Values and bytes of a quantisation block."""
        from gguf import GGML_QUANT_SIZES

        return GGML_QUANT_SIZES[self.type]

    @property
    def _row_bytes(self) -> int:
        values, num_bytes = self._block
        if self.size[-1] % values:
            raise ValueError(f"a row has {self.size[-1]} values, and {self.kind} has blocks of {values}")
        return self.size[-1] // values * num_bytes


@dataclass
class _Header:
    """A file's metadata, without lists, and its tensors."""

    values: dict[str, Value]
    tensors: dict[str, _QuantizedTensor]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    def of_model(self, name: str) -> Value:
        """Returns a metadata value whose key begins with the architecture."""
        return self.values.get(f"{self.architecture}.{name}")


def _by_hf_name(header: _Header, network: Network) -> dict[str, _QuantizedTensor]:
    """Returns the file's tensors by Hugging Face names; those without one keep their own."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    [architecture] = [key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture]
    names = get_tensor_name_map(architecture, len(network.layers))
    tensors = dict(header.tensors)
    for name, size, _, part in hf_tensors(network):
        module, kind = name.rsplit(".", 1)
        tensor = tensors.pop(f"{names.get_name(module)}.{kind}", None)
        if tensor is None:
            continue
        # llama.cpp's converter has permuted or shifted these.
        if header.architecture == "llama":
            heads = size[0] // part.rotary_dim if part.rotary_dim else None
            tensor = replace(tensor, paired_heads=heads)
        elif header.architecture == "nemotron" and name.endswith("norm.weight"):
            tensor = replace(tensor, added=1.0)
        tensors[name] = tensor
    return tensors


def _llama3_scaling(path: Path, config: "PretrainedConfig", factors: _QuantizedTensor) -> dict:
    """Recovers the settings of rotary scaling from the divisors of the frequencies in the file."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divisors = factors.read([np.arange(factors.size[-1])])
    plain = dict(config.rope_parameters)
    scaled = {**plain, **_LLAMA3, "rope_type": "llama3", "factor": float(divisors.max())}
    scaled_config = copy.deepcopy(config)
    scaled_config.rope_parameters = scaled
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled_config, torch.device("cpu"))
    dim = 2 * len(divisors)
    unscaled = 1.0 / plain["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    if len(frequencies) != len(divisors) or not torch.allclose(unscaled / frequencies, divisors, rtol=1e-4):
        raise UnsupportedModelError(
            f"{path}: {_ROPE_FACTORS} is not the rotary scaling of Llama 3.1 to 3.3: import the Hugging Face folder"
        )
    return scaled


def _read_header(path: Path) -> _Header:
    """Reads the header of a GGUF file, and checks that all tensors are inside the file.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with open(path, "rb") as file:
            return _parse(file, path, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError, struct.error) as e:
        raise CheckpointError(f"{path} is not a whole GGUF file: {e}") from e


def _parse(file: BufferedReader, path: Path, size: int) -> _Header:
    from gguf import GGMLQuantizationType

    def number(code: str) -> int:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

    def take(num_bytes: int) -> bytes:
        """Reads bytes, and skips those beyond the longest name."""
        if num_bytes > size - (begin := file.tell()):
            raise ValueError(f"{num_bytes} bytes should follow at byte {begin}, and it has {size}")
        content = file.read(min(num_bytes, _MAX_NAME))
        file.seek(begin + num_bytes)
        return content

    def text() -> str:
        return take(number("Q")).decode(errors="replace")

    def value(kind: int, is_element: bool = False) -> Value:
        if kind == _TEXT:
            return text()
        if kind == _ARRAY and not is_element:
            kind, length = number("I"), number("Q")
            if kind in _BYTES:
                take(_BYTES[kind] * length)
                return None
            for _ in range(length):  # each takes some bytes, so a false length ends with the file
                value(kind, is_element=True)
            return None
        if kind in _FLOATS:
            return float(struct.unpack(_FLOATS[kind], take(_BYTES[kind]))[0])
        if kind in _BYTES:
            return int.from_bytes(take(_BYTES[kind]), "little")
        raise ValueError(f"the value type {kind} at byte {file.tell() - 4} is unknown")

    magic, version = file.read(4), number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}, and should with b'GGUF', version 2 or 3")
    num_tensors, num_values = number("Q"), number("Q")
    values = {}
    for _ in range(num_values):
        name = text()
        values[name] = value(number("I"))
    entries = {}
    for _ in range(num_tensors):
        name = text()
        if not 1 <= (dimensions := number("I")) <= _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions, at byte {file.tell() - 4}")
        sizes = tuple(number("Q") for _ in range(dimensions))[::-1]
        entries[name] = sizes, GGMLQuantizationType(number("I")), number("Q")
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-file.tell() // alignment) * alignment
    tensors = {name: _QuantizedTensor(path, start + at, sizes, kind) for name, (sizes, kind, at) in entries.items()}
    for name, tensor in tensors.items():
        if tensor.start + tensor.num_bytes > size:
            raise ValueError(f"{name} should end at byte {tensor.start + tensor.num_bytes}, and it has {size}")
    return _Header(values, tensors)
