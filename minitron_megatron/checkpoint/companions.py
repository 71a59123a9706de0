"""What a checkpoint may hold beside a matrix: the mask of a sparse one, the scales of a rounded one, norms of inputs.

A companion of a matrix is a parameter of its own, with one element for a group of columns, in each row but for norms.
Its key is that of its matrix in its own layer, also where the matrices of all layers are stacked, with a suffix:

| suffix   | dtype    | an element                                                                             |
|----------|----------|----------------------------------------------------------------------------------------|
| `_mask`  | uint8    | eight columns, the first in the lowest bit; 1 where the weight stays                   |
| `_scale` | float32  | the columns that share a scale                                                         |
| `_norm`  | float32  | the norm of a column's inputs over the calibration set, the same for all rows          |

The scales of what generation caches are companions too, each a float32 number of one layer. Kinds of layers name them,
with `_cache_scale` at the end.

Megatron-Core ignores keys that it does not ask for, so such a checkpoint loads everywhere.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.model.axes import Grouped, Param
from minitron_megatron.model.layers import CACHE_SCALE
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import cache_scales, layer_key, parameters

MASK, SCALE, NORM = "_mask", "_scale", "_norm"
_BITS = 8


def mask_of(param: Param) -> Param:
    """Returns the mask of a matrix as a parameter."""
    return _companion(param, MASK, _BITS)


def scale_of(param: Param, group: int) -> Param:
    """Returns the scales of a matrix as a parameter.

    Args:
        param: the matrix.
        group: number of columns that share a scale.
    """
    return _companion(param, SCALE, group)


def norm_of(param: Param) -> Param:
    """Returns the norms of a matrix's inputs as a parameter."""
    return replace(param, name=f"{param.name}{NORM}", dims=(param.dims[1],), parts=(), matmul=False)


def _companion(param: Param, suffix: str, group: int) -> Param:
    rows, columns = param.dims
    return replace(param, name=f"{param.name}{suffix}", dims=(rows, Grouped(columns, group)), parts=(), matmul=False)


def is_companion(key: str) -> bool:
    """Returns whether a key in a checkpoint is that of a companion."""
    return key.endswith((*(f".weight{suffix}" for suffix in (MASK, SCALE, NORM)), CACHE_SCALE))


def dtype_of(companion: Param) -> torch.dtype:
    """Returns the number format of a companion on disk."""
    return torch.uint8 if companion.name.endswith(MASK) else torch.float32


def companions(network: Network, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Param]:
    """Returns the companions that a checkpoint holds, by key.

    Args:
        network: of the checkpoint.
        shapes: of the tensors in it, by key.
    """
    found = {layer_key(scale): scale for scale in cache_scales(network) if layer_key(scale) in shapes}
    for param in matrices(network):
        own = [mask_of(param), norm_of(param)]
        if (shape := shapes.get(f"{layer_key(param)}{SCALE}")) and len(shape) == 2 and shape[1]:
            own.append(scale_of(param, -(-param.shape[1] // shape[1])))
        found |= {layer_key(one): one for one in own if layer_key(one) in shapes}
    return found


def matrices(network: Network) -> Iterable[Param]:
    """Returns the matrices of a network's layers that tokens are multiplied by."""
    return [param for param in parameters(network) if param.matmul and param.position is not None]


def read_mask(source: TensorSource, param: Param, index: list[np.ndarray]) -> Tensor:
    """Reads positions of a matrix's mask.

    Args:
        source: that has the mask among its companions.
        param: the matrix.
        index: for each dimension, ascending positions in the matrix.

    Returns:
        bool, with the lengths of `index`.
    """
    rows, columns = index
    held, byte = np.unique(columns // _BITS, return_inverse=True)
    packed = source.read(mask_of(param), [rows, held])
    bits = unpack_mask(packed, len(held) * _BITS)
    return bits[:, torch.from_numpy(byte * _BITS + columns % _BITS)]


def columns_of(positions: np.ndarray, columns: int) -> np.ndarray:
    """Returns the columns of a matrix that positions of its mask hold.

    Args:
        positions: in the second dimension of the mask, ascending.
        columns: of the matrix.
    """
    every = (positions[:, None] * _BITS + np.arange(_BITS)).ravel()
    return every[every < columns]


def pack_mask(mask: Tensor) -> Tensor:
    """Packs bool `[rows, columns]` into uint8 `[rows, columns / 8]`, rounded up."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1, bitorder="little"))


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """Unpacks uint8 `[rows, columns / 8]` into bool `[rows, columns]`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little").astype(bool))
