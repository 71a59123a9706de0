"""Tensors in safetensors files, read at any positions, and those that are stored as 8-bit blocks with scales."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from minitron_megatron.checkpoint.row_io import bits, copy_rows
from minitron_megatron.errors import CheckpointError, UnsupportedModelError

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_SCALE_KINDS = {**_DTYPES, "F8_E8M0": torch.float8_e8m0fnu}
_SCALE = "_scale_inv"


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
class SafeTensor:
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
        assert self.dtype is not None
        return self.read_as(self.dtype, index)

    def read_as(self, dtype: torch.dtype, index: list[np.ndarray]) -> torch.Tensor:
        """Reads the stored bits as a dtype of their width."""
        out = torch.empty([len(i) for i in index], dtype=dtype)
        with open(self.path, "rb", buffering=0) as file:
            copy_rows(file, self.start, self.size, index, bits(out))
        return out


@dataclass(frozen=True)
class BlockScaled:
    """A matrix of 8-bit floats, each block of which is multiplied with a scale of its own, as DeepSeek publishes them.

    Attributes:
        weight: the 8-bit floats.
        scales: one for each block, [ceil(rows / block rows), ceil(columns / block columns)].
        block: rows and columns of a block.
    """

    weight: SafeTensor
    scales: SafeTensor
    block: tuple[int, int]

    @property
    def size(self) -> tuple[int, ...]:
        return self.weight.size

    @property
    def kind(self) -> str:
        return self.weight.kind

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, in which such models are trained."""
        return torch.bfloat16

    def read(self, index: list[np.ndarray]) -> torch.Tensor:
        """Returns the products in float32."""
        blocks = [np.unique(i // step, return_inverse=True) for i, step in zip(index, self.block, strict=True)]
        scales = self.scales.read_as(_SCALE_KINDS[self.scales.kind], [own for own, _ in blocks]).float()
        rows, columns = (torch.from_numpy(inverse) for _, inverse in blocks)
        return self.weight.read_as(_FP8[self.weight.kind], index).float() * scales[rows][:, columns]


def tensors_in(path: Path) -> dict[str, SafeTensor]:
    """Returns the tensors of a safetensors file by name. Opening it checks that it is complete.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
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
        name: SafeTensor(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in entries.items()
    }


def dequantized(tensors: Mapping[str, SafeTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Returns the tensors of a folder with every matrix of 8-bit blocks joined to its scales.

    Args:
        tensors: by name.
        config: content of the folder's `config.json`.

    Raises:
        UnsupportedModelError: the weights are quantised in another way.
        CheckpointError: the scales of a matrix are missing, or not of its size.
    """
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(settings, dict):
        raise CheckpointError("config.json is not the whole config of a model: quantization_config is no object")
    method = settings.get("quant_method") or ("an unnamed method" if settings else "fp8")
    if method != "fp8":
        raise UnsupportedModelError(
            f"config.json: the weights are quantised by {method} (quantization_config), which is not read: de-quantise "
            f"first, with dequantize() and save_pretrained() of transformers' model, or import the original model; if "
            f"they are plain numbers after all, take quantization_config out of config.json"
        )
    joined: dict[str, StoredTensor] = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.kind in _FP8:
            joined[name] = _with_scales(name, tensor, joined.pop(name + _SCALE, None), settings)
    return joined


def _with_scales(
    name: str, weight: SafeTensor, scales: StoredTensor | None, settings: Mapping[str, Any]
) -> BlockScaled:
    block = settings.get("weight_block_size") or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(type(step) is int and step > 0 for step in block)):
        raise UnsupportedModelError(
            f"config.json: quantization_config.weight_block_size = {block} is not supported: two sizes are read"
        )
    if not isinstance(scales, SafeTensor):
        raise CheckpointError(
            f"{weight.path}: {name} is {weight.kind} and {name}{_SCALE}, the scales of its blocks, is not there: "
            f"copy the whole folder, or de-quantise it first"
        )
    expected = tuple(-(-size // step) for size, step in zip(weight.size, block, strict=False))
    if len(weight.size) != 2 or scales.size != expected or scales.kind not in _SCALE_KINDS:
        raise CheckpointError(
            f"{scales.path}: {name}{_SCALE} is {list(scales.size)} of {scales.kind}, and blocks of {block} of "
            f"{list(weight.size)} need {list(expected)}: de-quantise the model first"
        )
    return BlockScaled(weight, scales, (block[0], block[1]))
