"""The settings of `minitron quantize`."""

from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.calibration import CalibrationConfig, Scheme, group_problems


class QuantizeMethod(str, Enum):
    """How weights are rounded."""

    RTN = "rtn"  # to nearest; needs no text
    GPTQ = "gptq"  # column by column, on weights that make up for the error so far (2210.17323)


class KVCache(str, Enum):
    """How keys and values are cached when the result is served."""

    FP8 = "fp8"  # 8-bit floats (e4m3), a scale for the keys and one for the values of each layer


@dataclass
class QuantizeConfig(CalibrationConfig):
    """`minitron quantize`: round a checkpoint's weights to few bits, layer by layer.

    The result holds the rounded weights in the source's number format, with their scales, so that every verb reads it;
    `export` packs them. What is zero in a sparse checkpoint stays zero.

    Attributes:
        scheme: what is rounded, and to what.
        method: how.
        group_size: columns that share a scale, for w4a16; null for 128, or else 64 or 32, where it divides the matrix's
            columns, and for whole rows where none does.
        ignore: matrices to leave as they are, as patterns of their names, such as `*.mlp.linear_fc2.weight` or
            `decoder.layers.0.*`.
        kv_cache: also measure with which scales keys and values are cached in fewer bits, by their largest values in
            the calibration set, for `export` to pack; null leaves the cache alone. Keys are measured as they are
            cached, after the rotary embedding, and with `sequential` after the layer has its rounded weights; else
            before. Needs text also with method=rtn.
    """

    scheme: Scheme = Scheme.W4A16
    method: QuantizeMethod = QuantizeMethod.GPTQ
    group_size: int | None = None
    ignore: list[str] = field(default_factory=list)
    most_norms: float | None = 4.0
    kv_cache: KVCache | None = None

    @property
    def needs_inputs(self) -> bool:
        return self.method is not QuantizeMethod.RTN

    @property
    def needs_text(self) -> bool:
        return self.needs_inputs or self.kv_cache is not None

    def problems(self, where: str = "") -> list[str]:
        return super().problems(where) + group_problems(where, self.scheme, self.group_size)
