"""Running a network with sublayers left out, computing once what several such networks share.

A path is the set of sublayers that it leaves out, by their positions in the pattern. Up to the first position at
which two paths part they have the same hidden states. So leaving out each layer of an L-layer network by itself
costs about L/2 forward passes beside the whole network's, and not L; measuring where a layer is left out alone
(Block Influence) costs none.

Every stage of a pipeline runs all paths through its own layers and sends their states on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.parallel.cpu import in_blocks
from minitron_megatron.parallel.groups import Groups
from minitron_megatron.parallel.schedule import Batch, forward_hidden, output_weight, own_tokens
from minitron_megatron.pruning.outputs import compare_outputs

Drops = frozenset[int]
WHOLE: Drops = frozenset()


class Ablation:
    """Runs micro-batches through a network and through what is left of it when paths leave sublayers out.

    Args:
        shape: of the whole network.
        groups: this rank's place.
        base: what every path leaves out; Block Influence is relative to it.
        paths: what to leave out, each a superset of `base`.
        outputs: whether to run all paths to the end and compare their predictions.

    Attributes:
        cosine: sum over valid tokens, for each path, of the cosine between the hidden states of base and path just
            behind the last sublayer that the path leaves out, `[path]` in float64. Each rank adds what no other adds.
    """

    def __init__(self, shape: ModelShape, groups: Groups, base: Drops, paths: Sequence[Drops], outputs: bool):
        self.shape = shape
        self.groups = groups
        self.base = base
        self.paths = list(paths)
        self.outputs = outputs
        self.cosine = torch.zeros(len(self.paths), dtype=torch.float64, device=groups.device)
        self._ends = [max(path - base) for path in self.paths]
        # Where nothing has to run again, no layer's output is kept longer than it takes to look at it.
        self._only_looks = not outputs and not base and all(map(_is_block, self.paths))

    def run(self, chunks: Sequence[GPTModel], batch: Batch, watching: AbstractContextManager) -> Tensor | None:
        """Run one micro-batch through the whole network, and through every path.

        Args:
            chunks: this rank's model.
            batch: `tokens`, `labels`, `position_ids`, `loss_mask`, each `[batch, seq]`.
            watching: entered while the whole network runs, and only then.

        Returns:
            on the last stage and if outputs are asked for, the comparison of `compare_outputs`, of the whole
            network and of the paths; else None.
        """
        groups, last = self.groups, None
        mask = own_tokens(batch["loss_mask"], groups)
        num_stages = groups.layout.pipeline * groups.layout.virtual_pipeline
        states: dict[Drops, Tensor] = {}
        runs: list[tuple] = []

        def advance(layer, inputs: dict, output: Tensor) -> None:
            nonlocal states
            states = self._advance(layer, inputs, output, states | {WHOLE: inputs["hidden_states"]}, mask)

        def keep(*run) -> None:
            runs.append(run)

        for number, chunk in enumerate(chunks):
            stage = number * groups.layout.pipeline + groups.pipeline_rank
            # Somebody's own stages may be uneven, or hold no layer.
            virtual = number if len(chunks) > 1 else None
            before = 2 * get_transformer_layer_offset(chunk.config, virtual, groups.pipeline_rank) - 1
            states = {}
            if stage > 0:
                dtype = chunk.config.pipeline_dtype or chunk.config.params_dtype
                states = self._receive(before, batch, dtype)
                chunk.set_input_tensor(states[WHOLE])
            with _after_layers(chunk, advance if self._only_looks else keep), watching:
                last = forward_hidden(chunk, batch)
            for run in runs:
                advance(*run)
            runs.clear()
            if stage < num_stages - 1:
                self._send(states or {WHOLE: last}, before + 2 * len(chunk.decoder.layers))
        if not self.outputs or not groups.is_last_stage:
            return None
        model = chunks[-1]
        weight = output_weight(model)
        hiddens = [last] + [model.decoder.final_layernorm(states[path]).to(weight.dtype) for path in self.paths]
        labels, counts = (batch[key].transpose(0, 1).flatten() for key in ("labels", "loss_mask"))
        return compare_outputs(
            [self._whole_sequence(hidden) for hidden in hiddens],
            weight,
            labels,
            counts,
            groups.collection.tp,
            self.shape.vocab,
        )

    def _parts(self, position: int) -> list[Drops]:
        """What base and paths have left out up to `position`, where that is something. Each once, in a fixed order.

        A path whose outputs are of no interest ends behind the last sublayer that it leaves out.
        """
        alive = [path for path, end in zip(self.paths, self._ends, strict=True) if self.outputs or position <= end]
        return sorted({_up_to(path, position) for path in [self.base, *alive]} - {WHOLE}, key=sorted)

    def _advance(self, layer, inputs: dict, output: Tensor, states: dict[Drops, Tensor], mask: Tensor) -> dict:
        """The states behind a layer, by what has been left out, from those before it."""
        positions = _positions(layer)
        behind = {WHOLE: output}
        for part in self._parts(positions[-1]):
            without = [self.shape.pattern[p] for p in positions if p in part]
            behind[part] = _run_layer(layer, inputs, states[part - set(positions)], without)
        for number, (path, end) in enumerate(zip(self.paths, self._ends, strict=True)):
            if end == positions[-1]:
                base, other = behind[_up_to(self.base, end)], behind[_up_to(path, end)]
            elif end in positions:  # inside of the layer: behind its attention
                before = states[_up_to(self.base, end) - {end}]
                base, other = _run_layer(layer, inputs, before, [MLP]), states[_up_to(path, end) - {end}]
            else:
                continue
            if self.groups.layout.sequence or self.groups.tensor_rank == 0:
                self.cosine[number] += (_cosine(base, other) * mask).sum(dtype=torch.float64)
        return behind

    def _receive(self, position: int, batch: Batch, dtype: torch.dtype) -> dict[Drops, Tensor]:
        """The states behind `position`, from the stage before this one."""
        parts, (size, sequence_length) = [WHOLE, *self._parts(position)], batch["tokens"].shape
        if self.groups.layout.sequence:
            sequence_length //= self.groups.layout.tensor
        states = torch.empty(
            len(parts), sequence_length, size, self.shape.hidden, dtype=dtype, device=self.groups.device
        )
        dist.recv(states, self._neighbour(-1), self.groups.collection.pp)
        return dict(zip(parts, states, strict=True))

    def _send(self, states: dict[Drops, Tensor], position: int) -> None:
        """Send the states behind `position` to the next stage."""
        together = torch.stack([states[part] for part in [WHOLE, *self._parts(position)]])
        dist.send(together, self._neighbour(1), self.groups.collection.pp)

    def _neighbour(self, step: int) -> int:
        group = self.groups.collection.pp
        return dist.get_global_rank(group, (group.rank() + step) % group.size())

    def _whole_sequence(self, hidden: Tensor) -> Tensor:
        """`[seq(/tp), batch, hidden]` to `[seq * batch, hidden]`."""
        if self.groups.layout.sequence:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.groups.collection.tp)
        return hidden.flatten(0, 1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension, in float32."""
    found, dot = [], torch.linalg.vecdot
    for one, other in in_blocks(a, b):
        one, other = one.float(), other.float()
        found.append(dot(one, other) * (dot(one, one) * dot(other, other)).clamp(min=1e-30).rsqrt())
    return torch.cat(found)


def _up_to(path: Drops, position: int) -> Drops:
    return frozenset(p for p in path if p <= position)


def _positions(layer) -> list[int]:
    """Positions in the pattern of a layer's sublayers: attention, then MLP."""
    number = layer.layer_number - 1
    return [2 * number, 2 * number + 1]


class _Nothing(torch.nn.Module):
    """A sublayer that adds nothing to the residual stream."""

    def forward(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        return torch.zeros_like(x), None


_MODULES = {ATTENTION: "self_attention", MLP: "mlp"}


def _run_layer(layer, inputs: dict, state: Tensor, without: list[str]) -> Tensor:
    """A layer's output for another hidden state, without its sublayers of the given kinds."""
    if len(without) == len(_MODULES):
        return state
    left_out = {_MODULES[kind]: getattr(layer, _MODULES[kind]) for kind in without}
    for name in left_out:
        setattr(layer, name, _Nothing())
    try:
        output = layer(**{**inputs, "hidden_states": state})
    finally:
        for name, module in left_out.items():
            setattr(layer, name, module)
    return output[0] if isinstance(output, tuple) else output


def _is_block(path: Drops) -> bool:
    """Whether a path leaves out layers as a whole that follow upon each other."""
    first, last = min(path), max(path)
    return (first % 2, last % 2) == (0, 1) and len(path) == last - first + 1


@contextmanager
def _after_layers(chunk: GPTModel, call: Callable[[torch.nn.Module, dict, Tensor], None]) -> Iterator[None]:
    """Calls with each layer of a chunk that has run, what it was called with, and what it returned."""

    def hook(layer, args, kwargs, output):
        assert not args, "Megatron-Core calls layers by keyword"
        call(layer, kwargs, output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in chunk.decoder.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
