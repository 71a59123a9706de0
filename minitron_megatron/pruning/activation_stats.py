"""Captures activations: hooks on a running Megatron-Core model that sum up importance.

Each rank adds to arrays of the whole network only what no other rank adds, so that one sum over all ranks gives the
model's scores, whatever the layout:

| axis                  | captured at              | a rank adds                                   |
|-----------------------|--------------------------|-----------------------------------------------|
| hidden                | output of every norm     | all of its channels, on the first tensor rank |
| those of a sublayer   | the taps of its kind     | the elements that it holds                    |

Under sequence parallelism the tokens of a norm's output lie on several tensor ranks, which first sum over them.

A hook only sums over tokens. The rest is done for all places at once after each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from minitron_megatron.config.schema import Aggregation, Neurons
from minitron_megatron.model.axes import HIDDEN
from minitron_megatron.model.build import held_sublayers
from minitron_megatron.model.layers.sublayer import Tap
from minitron_megatron.model.network import Network
from minitron_megatron.model.torch_modules import normalize
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import own_tokens
from minitron_megatron.pruning.scores import aggregate_sequence, scored_axes, sequence_score


class ElementSpans:
    """Lays out the elements of all places in one flat array per axis.

    The places of `hidden` are the norms: norm p precedes sublayer p, and the final norm is last. The places of any
    other axis are the sublayers that have it.

    Attributes:
        totals: length of the array, by setting.
    """

    def __init__(self, network: Network):
        num_norms = len(network.sublayers) + 1
        self.sizes: dict[str, dict[int, int]] = {
            HIDDEN.name: dict.fromkeys(range(num_norms), network.hidden_size),
            **{
                axis.setting: {
                    position: network.sublayers[position].total(axis) for position in network.positions(kind)
                }
                for kind, axis in scored_axes(network)
            },
        }
        self.totals = {setting: sum(sizes.values()) for setting, sizes in self.sizes.items()}

    def spans(self, setting: str) -> dict[int, slice]:
        """Returns the slice of the array for each place."""
        end, spans = 0, {}
        for place, size in self.sizes[setting].items():
            spans[place] = slice(end, end := end + size)
        return spans

    def split(self, setting: str, values: Tensor) -> list[Tensor]:
        """Splits an array `[..., total]` into one for each place, in order."""
        return list(values.split(list(self.sizes[setting].values()), dim=-1))


class ActivationStats:
    """Sums importance while a model runs. A context manager: the hooks are removed at its end.

    Works with both layer specs: where Transformer Engine fuses a norm into the following projection, the norm's formula
    is applied to that module's input.

    Args:
        model_chunks: this rank's model.
        network: the whole network.
        ctx: this rank's place.
        sequence_aggregation: over the tokens of a sequence, by setting.
        neurons: capture neurons after their activation and gate, or before.

    Attributes:
        sums: by setting, `[2, total]` in float64 (see `ElementSpans`): the scores of all sequences so far, summed, and
            their squares.
        num_sequences: sequences with a valid token so far.
    """

    def __init__(
        self,
        model_chunks: Sequence[MegatronModule],
        network: Network,
        ctx: ParallelContext,
        sequence_aggregation: Mapping[str, Aggregation],
        neurons: Neurons = Neurons.AFTER,
    ):
        self.model_chunks = model_chunks
        self.network = network
        self.ctx = ctx
        self.how = sequence_aggregation
        self.neurons = neurons
        layout = ElementSpans(network)
        self._spans = {setting: layout.spans(setting) for setting in layout.totals}
        self.sums = {
            setting: torch.zeros(2, total, dtype=torch.float64, device=ctx.device)
            for setting, total in layout.totals.items()
        }
        self.num_sequences = torch.zeros((), dtype=torch.float64, device=ctx.device)
        # Of the current micro-batch: by setting and place, the sums over this rank's tokens.
        self._current: dict[str, dict[int, Tensor]] = {setting: {} for setting in layout.totals}
        self._mask: Tensor  # of the whole sequence, [seq, batch]
        self._own_mask: Tensor  # of this rank's part of it under sequence parallelism
        self._num_tokens: Tensor
        self._all_valid = False
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> ActivationStats:
        for chunk in self.model_chunks:
            for positions, layer in held_sublayers(chunk, self.network):
                for position in positions:
                    self._watch(position, layer)
            if (final_norm := chunk.decoder.final_layernorm) is not None:
                self._after(final_norm, self._channels(len(self.network.sublayers)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def set_mask(self, loss_mask: Tensor) -> None:
        """Sets which tokens `[batch, seq]` count in the next forward pass. Call it before each micro-batch."""
        self._mask, self._own_mask = loss_mask.transpose(0, 1), own_tokens(loss_mask, self.ctx)
        self._num_tokens = self._mask.sum(0, dtype=torch.float64)
        self._all_valid = bool((self._num_tokens == len(self._mask)).all())
        if self.ctx.tensor_rank == self.ctx.pipeline_rank == 0:
            self.num_sequences += (self._num_tokens > 0).sum()

    def add_up(self) -> Tensor:
        """Adds the last forward pass to `sums`. Call it after each micro-batch, on all tensor ranks.

        Returns:
            the first place in the network with an activation that is not finite, inf if there is none. A norm has the
            position of its sublayer, other activations that position plus one half.
        """
        faults = [torch.full((), torch.inf, dtype=torch.float64, device=self.ctx.device)]
        for setting, current in self._current.items():
            if not current:
                continue
            is_hidden = setting == HIDDEN.name
            places, sizes = list(current), [values.size(-1) for values in current.values()]
            together = torch.cat(list(current.values()), dim=-1)
            current.clear()
            if is_hidden and self.ctx.layout.sequence:
                sum_over(together, self.ctx.collection.tp)
            # A sequence without valid tokens has sums, and then a score, of 0.
            first, second = together
            score = sequence_score(first, second, self._num_tokens.clamp(min=1), self.how[setting])
            sums = torch.stack([score.sum(0), score.square().sum(0)])
            for place, own in zip(places, sums.split(sizes, dim=-1), strict=True):
                at = torch.full((), place if is_hidden else place + 0.5, dtype=sums.dtype, device=sums.device)
                faults.append(at.where(~own[1].isfinite().all(), torch.inf))
                self._add(setting, place, own)
        return torch.stack(faults).min()

    def _add(self, setting: str, place: int, sums: Tensor) -> None:
        """Adds this rank's part of a place's elements, unless another rank adds it."""
        span, rank = self._spans[setting][place], self.ctx.tensor_rank
        if setting != HIDDEN.name:
            start = span.start + rank * sums.size(-1)
            self.sums[setting][:, start : start + sums.size(-1)] += sums
        elif rank == 0:
            self.sums[setting][:, span] += sums

    def _watch(self, position: int, layer: torch.nn.Module) -> None:
        """Registers the hooks of one sublayer, and of the norm before it."""
        sublayer = self.network.sublayers[position]
        norm, channels = getattr(layer, sublayer.slot.norm), self._channels(position)
        if isinstance(norm, IdentityOp):
            linear: Any = sublayer.first_projection(layer)  # of Transformer Engine, whose modules have no types

            def normed(x: Tensor) -> None:
                channels(normalize(x, linear.layer_norm_weight, linear.layer_norm_bias, linear.config))

            self._before(linear, normed)
        else:
            self._after(norm, channels)
        for tap in sublayer.taps(layer, self.neurons is Neurons.BEFORE):

            def watch(value: Any, tap: Tap = tap) -> None:
                self._sum(tap.setting, position, tap.elements(value), self._mask)

            (self._before if tap.at_input else self._after)(tap.module, watch)

    def _channels(self, place: int) -> Callable[[Tensor], None]:
        def watch(x: Tensor) -> None:
            # Without sequence parallelism all tensor ranks have the same activations.
            if self.ctx.layout.sequence or self.ctx.tensor_rank == 0:
                self._sum(HIDDEN.name, place, x, self._own_mask)

        return watch

    def _sum(self, setting: str, place: int, x: Tensor, mask: Tensor) -> None:
        """Sums `[seq, batch, elements]` over the tokens that count."""
        if not self._all_valid:
            x = x * mask.unsqueeze(-1).to(x.dtype)
        self._current[setting][place] = aggregate_sequence(x, self.how[setting])

    def _before(self, module: torch.nn.Module, call: Callable[[Any], None]) -> None:
        self._hooks.append(module.register_forward_pre_hook(lambda module, args: call(args[0])))

    def _after(self, module: torch.nn.Module, call: Callable[[Any], None]) -> None:
        self._hooks.append(module.register_forward_hook(lambda module, args, output: call(output)))


def place_name(place: float, network: Network) -> str:
    """Returns the name of a place that `ActivationStats.add_up` reports, for messages."""
    if place == len(network.sublayers):
        return f"activations of the final norm ({HIDDEN.name})"
    position = int(place)
    what = [HIDDEN.name] if place == position else [axis.setting for axis in network.sublayers[position].scored()]
    return f"activations of layer {network.layer_of(position)} ({', '.join(what)})"
