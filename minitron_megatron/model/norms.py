"""The kinds of norms, and their rows of the axis table."""

from enum import Enum

from minitron_megatron.model.axes import Dim, Part, Row


class NormKind(str, Enum):
    RMSNORM = "rmsnorm"
    LAYERNORM = "layernorm"

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return ("weight", "bias") if self is NormKind.LAYERNORM else ("weight",)


def norm_rows(kind: NormKind, dim: Dim, prefix: str, hf_prefix: str) -> list[Row]:
    """Returns the rows of one norm over `dim`, with prefixes of their Megatron and Hugging Face keys."""
    return [Row(prefix + tensor, (dim,), None, (Part(hf_prefix + tensor),)) for tensor in kind.tensors]
