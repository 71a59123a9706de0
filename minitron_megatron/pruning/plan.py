"""The plan: which elements of a network stay. Plain data, made from scores, applied by `slicing`."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_megatron.checkpoint.manifest import write_atomically
from minitron_megatron.config.schema import TargetConfig
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.model.axes import Kept
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape, layers_pattern
from minitron_megatron.pruning.scores import Scores

FILE = "plan.json"


@dataclass
class Plan:
    """What stays of a network. All indices count in the source and ascend.

    Attributes:
        source: shape of the network that is cut.
        target: shape of what is left.
        sublayers: kept positions of the source's pattern.
        hidden: kept channels of the residual stream.
        ffn: kept neurons, by position of the MLP sublayer.
        head: kept heads within each query group `[group, head]`, by position of the attention sublayer.
    """

    source: ModelShape
    target: ModelShape
    sublayers: list[int]
    hidden: list[int]
    ffn: dict[int, list[int]]
    head: dict[int, list[list[int]]]

    def source_layer(self, sublayer: str, layer: int) -> int:
        """Where sublayer number `layer` of a kind, in the target, lies among those of the source."""
        return self.source.sublayers(sublayer).index(self._position(sublayer, layer))

    def kept(self, sublayer: str | None, layer: int | None) -> Kept:
        """Kept indices along every axis, for the parameters of one sublayer of the target."""
        kept = {"hidden": np.array(self.hidden)}
        if sublayer == MLP:
            kept["ffn"] = np.array(self.ffn[self._position(sublayer, layer)])
        if sublayer == ATTENTION:
            kept["head"] = np.array(self.head[self._position(sublayer, layer)])
        return kept

    def _position(self, sublayer: str, layer: int) -> int:
        return [p for p in self.sublayers if self.source.pattern[p] == sublayer][layer]

    def write(self, folder: Path) -> None:
        """Write `plan.json` into `folder`."""
        values = {
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "kept": {"sublayers": self.sublayers, "hidden": self.hidden, "ffn": self.ffn, "head": self.head},
        }
        write_atomically(folder / FILE, json.dumps(values) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Read the plan in `folder`.

        Raises:
            CheckpointError: there is none, or it cannot be understood.
        """
        try:
            values = json.loads((folder / FILE).read_text())
            kept = values["kept"]
            return cls(
                ModelShape.from_dict(values["source"]),
                ModelShape.from_dict(values["target"]),
                kept["sublayers"],
                kept["hidden"],
                {int(position): indices for position, indices in kept["ffn"].items()},
                {int(position): indices for position, indices in kept["head"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{folder / FILE} is not a plan: {e}") from e


def target_shape(source: ModelShape, target: TargetConfig) -> ModelShape:
    """The shape that `target` asks for.

    Raises:
        ConfigError: it is larger than the source, or heads do not spread over the groups evenly.
    """
    asked = {
        "layers": (target.layers, source.num_layers),
        "hidden": (target.hidden, source.hidden),
        "ffn": (target.ffn, source.ffn),
        "heads": (target.heads, source.num_heads),
    }
    problems = [
        f"target.{name} = {wanted} is larger than the source's {has}: pruning only removes"
        for name, (wanted, has) in asked.items()
        if wanted is not None and wanted > has
    ]
    if target.heads is not None and target.heads % source.num_query_groups:
        problems.append(
            f"target.heads = {target.heads} is not a multiple of the {source.num_query_groups} query groups: "
            f"every group keeps the same number of heads"
        )
    raise_if_any(problems)
    layers, hidden, ffn, heads = (wanted if wanted is not None else has for wanted, has in asked.values())
    return source.replace(pattern=layers_pattern(layers), hidden=hidden, ffn=ffn, num_heads=heads)


def make_plan(scores: Scores, target: ModelShape) -> Plan:
    """Keep the elements of highest score: rank, then cut.

    Hidden channels are ranked once for the network, neurons per MLP, heads within their query group, and
    layers by Block Influence. Of equal scores the lower index stays.
    """
    source = scores.shape
    sublayers = [p for layer in _top(scores.layer, target.num_layers) for p in (2 * layer, 2 * layer + 1)]
    attention, mlp = source.sublayers(ATTENTION), source.sublayers(MLP)
    kept = set(sublayers)
    return Plan(
        source=source,
        target=target,
        sublayers=sublayers,
        hidden=_top(scores.hidden, target.hidden),
        ffn={p: _top(s, target.ffn) for p, s in zip(mlp, scores.ffn, strict=True) if p in kept},
        head={
            p: [_top(group, target.heads_per_group) for group in s]
            for p, s in zip(attention, scores.head, strict=True)
            if p in kept
        },
    )


def _top(scores, count: int) -> list[int]:
    """The `count` indices of highest score, ascending."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    return sorted(order[:count].tolist())
