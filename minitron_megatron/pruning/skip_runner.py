"""Runs a network without some sublayers, and computes only once what several such runs share.

A path is the set of sublayers that it skips, by their positions in the network. Up to the first position at which two
paths differ they have the same hidden states. So skipping each layer of an L-layer network by itself costs about L/2
additional forward passes rather than L; a measurement right behind the skipped layer (Block Influence) costs none.

Every pipeline stage runs all paths through its own layers and sends their states on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from minitron_megatron.distillation.logit_change import compare_outputs
from minitron_megatron.model.build import first_position, held_sublayers
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.cpu import in_blocks
from minitron_megatron.parallel.schedule import Batch, forward_hidden, output_weight, own_tokens

Skipped = frozenset[int]
WHOLE: Skipped = frozenset()

_Held = tuple[tuple[int, ...], torch.nn.Module]
"""The positions of a layer's sublayers, and the layer of Megatron-Core on this rank."""


class SkipRunner:
    """Runs micro-batches through a network, and through paths that skip some of its sublayers.

    Args:
        network: the whole network.
        ctx: this rank's place.
        base: sublayers that every path skips; Block Influence is relative to it.
        paths: sets of sublayers to skip, each a superset of `base`.
        outputs: whether to run all paths to the end and compare their predictions.

    Attributes:
        cosine: sum over valid tokens, for each path, of the cosine between the hidden states of base and path right
            behind the last sublayer that the path skips, `[path]` in float64. Each rank adds what no other adds.
    """

    def __init__(self, network: Network, ctx: ParallelContext, base: Skipped, paths: Sequence[Skipped], outputs: bool):
        self.network = network
        self.ctx = ctx
        self.base = base
        self.paths = list(paths)
        self.outputs = outputs
        self.cosine = torch.zeros(len(self.paths), dtype=torch.float64, device=ctx.device)
        self._ends = [max(path - base) for path in self.paths]
        # If no layer has to run again, no layer's output is kept.
        self._only_looks = not outputs and not base and all(map(self._is_block, self.paths))

    def run(
        self, model_chunks: Sequence[MegatronModule], batch: Batch, watching: AbstractContextManager
    ) -> Tensor | None:
        """Runs one micro-batch through the whole network, and through every path.

        Args:
            model_chunks: this rank's model.
            batch: `tokens`, `labels`, `position_ids`, `loss_mask`, each `[batch, seq]`.
            watching: entered while the whole network runs, and only then.

        Returns:
            the result of `compare_outputs` for the whole network and the paths, on the last stage and if `outputs` is
            set; else None.
        """
        ctx = self.ctx
        last: Tensor  # of the chunk that ran last
        mask = own_tokens(batch["loss_mask"], ctx)
        num_stages = ctx.layout.stages
        states: dict[Skipped, Tensor] = {}
        runs: list[tuple[_Held, dict, Tensor]] = []

        def advance(held: _Held, inputs: dict, output: Tensor) -> None:
            nonlocal states
            states = self._advance(held, inputs, output, states | {WHOLE: inputs["hidden_states"]}, mask)

        def keep(held: _Held, inputs: dict, output: Tensor) -> None:
            runs.append((held, inputs, output))

        for number, chunk in enumerate(model_chunks):
            stage = number * ctx.layout.pipeline + ctx.pipeline_rank
            held = list(held_sublayers(chunk, self.network))
            virtual = number if len(model_chunks) > 1 else None
            before = first_position(chunk, self.network, ctx, virtual) - 1
            states = {}
            if stage > 0:
                dtype = chunk.config.pipeline_dtype or chunk.config.params_dtype
                states = self._receive(before, batch, dtype)
                chunk.set_input_tensor(states[WHOLE])
            with _after_layers(held, advance if self._only_looks else keep), watching:
                last = forward_hidden(chunk, batch)
            for run in runs:
                advance(*run)
            runs.clear()
            if stage < num_stages - 1:
                self._send(states or {WHOLE: last}, held[-1][0][-1] if held else before)
        if not self.outputs or not ctx.is_last_stage:
            return None
        model = model_chunks[-1]
        weight = output_weight(model)
        hiddens = [last] + [model.decoder.final_layernorm(states[path]).to(weight.dtype) for path in self.paths]
        labels, counts = (batch[key].transpose(0, 1).flatten() for key in ("labels", "loss_mask"))
        return compare_outputs(
            [self._whole_sequence(hidden) for hidden in hiddens],
            weight,
            labels,
            counts,
            ctx.collection.tp,
            self.network.vocab_size,
        )

    def _parts(self, position: int) -> list[Skipped]:
        """Returns what base and paths have skipped up to `position`, if anything. Each once, in a fixed order.

        Without `outputs` a path ends behind the last sublayer that it skips.
        """
        alive = [path for path, end in zip(self.paths, self._ends, strict=True) if self.outputs or position <= end]
        return sorted({_up_to(path, position) for path in [self.base, *alive]} - {WHOLE}, key=sorted)

    def _advance(self, held: _Held, inputs: dict, output: Tensor, states: dict[Skipped, Tensor], mask: Tensor) -> dict:
        """Returns the states behind a layer, by what was skipped, from those before it."""
        positions, _ = held
        behind = {WHOLE: output}
        for part in self._parts(positions[-1]):
            before = states[part - set(positions)]
            behind[part] = self._run_layer(held, inputs, before, [p for p in positions if p in part])
        for number, (path, end) in enumerate(zip(self.paths, self._ends, strict=True)):
            if end not in positions:
                continue
            # Inside a layer these are the states behind the sublayer, without the rest of the layer.
            after = [position for position in positions if position > end]
            base, other = (
                self._behind(held, inputs, states, behind, _up_to(drops, end), end, after)
                for drops in (self.base, path)
            )
            if self.ctx.layout.sequence or self.ctx.tensor_rank == 0:
                self.cosine[number] += (_cosine(base, other) * mask).sum(dtype=torch.float64)
        return behind

    def _behind(
        self,
        held: _Held,
        inputs: dict,
        states: dict[Skipped, Tensor],
        behind: dict[Skipped, Tensor],
        part: Skipped,
        end: int,
        after: list[int],
    ) -> Tensor:
        """Returns the state right behind the sublayer at `end` of a layer, without the sublayers of `part`."""
        if not after:
            return behind[part]
        own = set(held[0])
        gone = [position for position in held[0] if position in part]
        return self._run_layer(held, inputs, states[part - own], [*gone, *after])

    def _run_layer(self, held: _Held, inputs: dict, state: Tensor, without: list[int]) -> Tensor:
        """Runs a layer on another hidden state, without some of its sublayers."""
        positions, layer = held
        if len(without) == len(positions):
            return state
        names = [self.network.sublayers[position].slot.module for position in without]
        left_out = {name: getattr(layer, name) for name in names}
        for name in left_out:
            setattr(layer, name, _ZeroOutput())
        try:
            output = layer(**{**inputs, "hidden_states": state})
        finally:
            for name, module in left_out.items():
                setattr(layer, name, module)
        return output[0] if isinstance(output, tuple) else output

    def _is_block(self, path: Skipped) -> bool:
        """Returns whether a path skips a contiguous block of whole layers."""
        layers = sorted({self.network.layer_of(position) for position in path})
        whole = {position for layer in layers for position in self.network.layers[layer]}
        return path == whole and layers == list(range(layers[0], layers[-1] + 1))

    def _receive(self, position: int, batch: Batch, dtype: torch.dtype) -> dict[Skipped, Tensor]:
        """Receives the states behind `position` from the previous stage."""
        parts, (size, sequence_length) = [WHOLE, *self._parts(position)], batch["tokens"].shape
        if self.ctx.layout.sequence:
            sequence_length //= self.ctx.layout.tensor
        states = torch.empty(
            len(parts), sequence_length, size, self.network.hidden_size, dtype=dtype, device=self.ctx.device
        )
        dist.recv(states, self._neighbour(-1), self.ctx.collection.pp)
        return dict(zip(parts, states, strict=True))

    def _send(self, states: dict[Skipped, Tensor], position: int) -> None:
        """Sends the states behind `position` to the next stage."""
        together = torch.stack([states[part] for part in [WHOLE, *self._parts(position)]])
        dist.send(together, self._neighbour(1), self.ctx.collection.pp)

    def _neighbour(self, step: int) -> int:
        group = self.ctx.collection.pp
        return dist.get_global_rank(group, (group.rank() + step) % group.size())

    def _whole_sequence(self, hidden: Tensor) -> Tensor:
        """Reshapes `[seq(/tp), batch, hidden]` to `[seq * batch, hidden]`."""
        if self.ctx.layout.sequence:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.ctx.collection.tp)
        return hidden.flatten(0, 1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosine over the last dimension, in float32."""
    cosines, dot = [], torch.linalg.vecdot
    for one, other in in_blocks(a, b):
        one, other = one.float(), other.float()
        cosines.append(dot(one, other) * (dot(one, one) * dot(other, other)).clamp(min=1e-30).rsqrt())
    return torch.cat(cosines)


def _up_to(path: Skipped, position: int) -> Skipped:
    return frozenset(p for p in path if p <= position)


class _ZeroOutput(torch.nn.Module):
    """A sublayer that adds nothing to the residual stream."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(x), None


@contextmanager
def _after_layers(held: Sequence[_Held], call: Callable[[_Held, dict, Tensor], None]) -> Iterator[None]:
    """Calls with each layer of a chunk that has run, what it was called with, and what it returned."""

    def watch(own: _Held) -> RemovableHandle:
        def hook(layer: torch.nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            assert not args, "Megatron-Core calls layers by keyword"
            call(own, kwargs, output[0] if isinstance(output, tuple) else output)

        return own[1].register_forward_hook(hook, with_kwargs=True)

    hooks = [watch(own) for own in held]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
