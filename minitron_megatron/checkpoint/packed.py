"""Packs rounded weights as compressed-tensors does, by its own package, for the serving engines that read it.

Zeros of 2:4 are kept as zeros. No `sparsity_config` is ever written: vLLM refuses it, and transformers loads random
weights for the formats that it names.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minitron_megatron.checkpoint.companions import SCALE, matrices, scale_of
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.hf_names import hf_tensors, output_name
from minitron_megatron.checkpoint.safetensors_writer import Tensor
from minitron_megatron.config.calibration import NOT_SERVED, Scheme, is_served
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model.axes import Param, Part
from minitron_megatron.model.parameters import layer_key

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

_FORMATS = {
    Scheme.W4A16: "pack-quantized",
    Scheme.W8A8: "int-quantized",
    Scheme.FP8: "float-quantized",
}
_PACKED_BITS = 32


class Packed:
    """The tensors and the `quantization_config` of a quantised checkpoint, packed.

    Args:
        checkpoint: with scales beside its matrices.

    Raises:
        ConfigError: compressed-tensors is not installed.
        CheckpointError: the checkpoint does not say its scheme, or has groups that no reader knows.
    """

    def __init__(self, checkpoint: Checkpoint):
        if find_spec("compressed_tensors") is None:
            raise ConfigError(
                [
                    "packed = true needs compressed-tensors, which is not installed: pip install compressed-tensors, "
                    "or set packed=false to write the rounded weights as they are"
                ]
            )
        self.checkpoint = checkpoint
        name = checkpoint.manifest.details.get("scheme")
        if name not in set(Scheme):
            raise CheckpointError(
                f"{checkpoint.root} has scales, and its manifest names no scheme: quantise it again, or set "
                f"packed=false"
            )
        self.scheme = Scheme(name)
        scales = {(scale.position, scale.name): scale for scale in checkpoint.scales}
        self._groups: dict[str, int] = {}
        for param in matrices(checkpoint.network):
            if scale := scales.get((param.position, f"{param.name}{SCALE}")):
                group = -(-param.shape[1] // scale.shape[1])
                if not is_served(group, param.shape[1]):
                    raise CheckpointError(
                        f"{checkpoint.root} has a scale for every {group} columns of {layer_key(param)}, and "
                        f"{NOT_SERVED}: quantise it with one of these group sizes, or set packed=false"
                    )
                self._groups[layer_key(param)] = group

    def tensors(self) -> Iterator[Tensor]:
        """Yields the tensors to write. Weights are packed a block of rows at a time."""
        network, dtype = self.checkpoint.network, self.checkpoint.dtype
        for name, size, param, part in hf_tensors(network):
            group = self._groups.get(layer_key(param))
            if group is None:
                yield Tensor(name, tuple(size), dtype, partial(self._read, param, part))
                continue
            rows, columns = size
            scheme = self._scheme_of(None if group == columns else group)
            stem = name.removesuffix("weight")
            read = partial(self._packed_rows, param, part, scheme, name)
            if self.scheme is Scheme.W4A16:
                width = -(-columns * self._bits // _PACKED_BITS)
                yield Tensor(f"{stem}weight_packed", (rows, width), torch.int32, partial(read, "weight_packed"))
                yield Tensor(f"{stem}weight_shape", (2,), torch.int64, partial(_slice, torch.tensor(size)))
            else:
                kind = torch.int8 if self.scheme is Scheme.W8A8 else torch.float8_e4m3fn
                yield Tensor(name, (rows, columns), kind, partial(read, "weight"))
            scales = partial(self._scales, param, part, group)
            yield Tensor(f"{stem}weight_scale", (rows, -(-columns // group)), dtype, scales)
        for scale in self.checkpoint.cache_scales:
            for part in scale.parts:
                size = tuple(scale.hf_shape(part, network.vocab_size))
                yield Tensor(scale.hf_name(part), size, torch.float32, partial(self._read, scale, part))

    def config(self) -> dict[str, Any]:
        """Returns the `quantization_config`."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

        by_group: dict[int | None, set[str]] = {}  # None for a scale of each row
        ignored = set(filter(None, [_module(output_name(self.checkpoint.network.replace(tie_embeddings=False)))]))
        for name, size, param, part in hf_tensors(self.checkpoint.network):
            group = self._groups.get(layer_key(param))
            if group is not None:
                by_group.setdefault(None if group == size[1] else group, set()).add(_pattern(part))
            elif param.matmul and param.position is not None:
                ignored.add(_module(name) or name)
        one = len(by_group) == 1
        groups = {
            f"group_{number}": self._scheme_of(group, ["Linear"] if one else sorted(patterns))
            for number, (group, patterns) in enumerate(sorted(by_group.items(), key=str))
        }
        config = QuantizationConfig(
            config_groups=groups,
            format=_FORMATS[self.scheme],
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=sorted(ignored),
            kv_cache_scheme=_per_tensor_fp8() if self.checkpoint.cache_scales else None,
        )
        return config.model_dump(mode="json")

    @property
    def _bits(self) -> int:
        return 4 if self.scheme is Scheme.W4A16 else 8

    def _scheme_of(self, group: int | None, targets: Sequence[str] = ("Linear",)) -> "QuantizationScheme":
        """Returns how compressed-tensors describes matrices with this group size; None for a scale of each row."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy

        kind = "float" if self.scheme is Scheme.FP8 else "int"
        weights = QuantizationArgs(
            num_bits=self._bits,
            type=kind,
            symmetric=True,
            strategy=QuantizationStrategy.CHANNEL if group is None else QuantizationStrategy.GROUP,
            group_size=group,
        )
        activations = None
        if self.scheme is not Scheme.W4A16:
            by_token = QuantizationStrategy.TOKEN
            activations = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy=by_token, dynamic=True)
        return QuantizationScheme(targets=list(targets), weights=weights, input_activations=activations)

    def _read(self, param: Param, part: Part, low: int, high: int) -> torch.Tensor:
        rows = param.hf_rows(part, self.checkpoint.network.vocab_size)[low:high]
        return self.checkpoint.read(param, [rows, *(np.arange(size) for size in param.shape[1:])])

    def _scales(self, param: Param, part: Part, group: int, low: int, high: int) -> torch.Tensor:
        rows = param.hf_rows(part, self.checkpoint.network.vocab_size)[low:high]
        scale = scale_of(param, group)
        return self.checkpoint.read(scale, [rows, np.arange(scale.shape[1])]).to(self.checkpoint.dtype)

    def _packed_rows(
        self, param: Param, part: Part, scheme: "QuantizationScheme", name: str, kind: str, low: int, high: int
    ) -> torch.Tensor:
        """Returns packed rows of a matrix, whose weights are exactly those of the checkpoint when unpacked.

        Raises:
            CheckpointError: they are not: the weights are not those that the scales belong to.
        """
        from compressed_tensors.compressors import BaseCompressor

        compressor = BaseCompressor.get_value_from_registry(_FORMATS[self.scheme])
        weight = self._read(param, part, low, high)
        scales = self._scales(param, part, self._groups[layer_key(param)], low, high)
        packed = compressor.compress({"weight": weight.float(), "weight_scale": scales.float()}, scheme)
        again = compressor.decompress(packed, scheme)["weight"].to(weight.dtype)
        if not torch.equal(again, weight):
            raise CheckpointError(
                f"{name}: its weights are not multiples of their scales, as after training: quantise the checkpoint "
                f"again, or set packed=false"
            )
        return packed[kind]


def _per_tensor_fp8() -> "QuantizationArgs":
    """Returns how compressed-tensors describes 8-bit floats with one scale, known before, for a whole tensor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

    return QuantizationArgs(
        num_bits=8, type="float", symmetric=True, strategy=QuantizationStrategy.TENSOR, dynamic=False
    )


def _slice(tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return tensor[low:high]


def _module(name: str | None) -> str | None:
    return name and name.removesuffix(".weight")


def _pattern(part: Part) -> str:
    """Returns compressed-tensors' pattern of a matrix in every layer."""
    return "re:" + re.escape(part.name.removesuffix(".weight")).replace(re.escape("{layer}"), r"\d+") + "$"
