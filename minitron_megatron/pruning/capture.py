"""Capturing activations: hooks on a running Megatron-Core model that sum up importance as it goes.

Each rank adds to arrays of the whole network, and only what no other rank adds as well, so that one sum over all
ranks gives the model's scores, whatever the layout:

| axis   | captured at                                | a rank adds                                            |
|--------|--------------------------------------------|--------------------------------------------------------|
| hidden | output of every norm                       | all of its channels, on the first tensor rank           |
| ffn    | input of the MLP's second projection       | its own neurons                                        |
|        | or output of the first, before the gate    |                                                        |
| head   | input of the attention output projection   | the heads of its own groups                            |

Under sequence parallelism the tokens of a norm's output lie on several tensor ranks, which add them up first.
"""

from collections.abc import Sequence

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from minitron_megatron.config.schema import Aggregation, Neurons
from minitron_megatron.errors import DataError
from minitron_megatron.model.build import Backbone
from minitron_megatron.model.local import normalize
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.groups import Groups
from minitron_megatron.pruning.scores import aggregate_sequence, sequence_score


class Capture:
    """Sums importance while a model runs. A context manager: the hooks are there inside of it alone.

    Works with both layer specs: where Transformer Engine fuses a norm into the projection behind it, the
    norm's formula is applied to that module's input.

    Args:
        chunks: this rank's model.
        shape: of the whole network.
        groups: this rank's place.
        sequence_aggregation: over the tokens of a sequence.
        neurons: look at neurons after their activation and gate, or before.

    Attributes:
        sums: by axis, `[2, sublayer or norm, element]` in float64: the scores of all sequences so far, summed, and
            their squares. Norm p stands before sublayer p of the pattern, and the final one is last.
        num_sequences: with any valid token, so far.
    """

    def __init__(
        self,
        chunks: Sequence[Backbone],
        shape: ModelShape,
        groups: Groups,
        sequence_aggregation: Aggregation,
        neurons: Neurons = Neurons.AFTER,
    ):
        self.chunks = chunks
        self.shape = shape
        self.groups = groups
        self.how = sequence_aggregation
        self.neurons = neurons
        sizes = {
            "hidden": (len(shape.pattern) + 1, shape.hidden),
            "ffn": (len(shape.sublayers(MLP)), shape.ffn),
            "head": (len(shape.sublayers(ATTENTION)), shape.num_heads),
        }
        self.sums = {
            axis: torch.zeros(2, *size, dtype=torch.float64, device=groups.device) for axis, size in sizes.items()
        }
        self.num_sequences = torch.zeros((), dtype=torch.float64, device=groups.device)
        self._mask: Tensor | None = None  # of the whole sequence, [seq, batch]
        self._own_mask: Tensor | None = None  # of this rank's part of it under sequence parallelism
        self._num_tokens: Tensor | None = None
        self._all_valid = False
        self._hooks: list = []

    def __enter__(self) -> "Capture":
        for chunk in self.chunks:
            for layer in chunk.decoder.layers:
                number = layer.layer_number - 1
                attention, mlp = layer.self_attention, layer.mlp
                self._on_norm(layer.input_layernorm, attention.linear_qkv, 2 * number)
                self._on_norm(layer.pre_mlp_layernorm, mlp.linear_fc1, 2 * number + 1)
                self._before(attention.linear_proj, lambda x, n=number: self._add_heads(n, x))
                if self.neurons is Neurons.AFTER:
                    self._before(mlp.linear_fc2, lambda x, n=number: self._add_own("ffn", n, x))
                else:
                    self._after(mlp.linear_fc1, lambda output, n=number: self._add_inputs(n, output))
            if chunk.decoder.final_layernorm is not None:
                self._on_norm(chunk.decoder.final_layernorm, None, len(self.shape.pattern))
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def set_mask(self, loss_mask: Tensor) -> None:
        """Say which tokens, `[batch, seq]`, count in the forward passes to come. Once per micro-batch."""
        self._mask, self._own_mask = loss_mask.transpose(0, 1), own_tokens(loss_mask, self.groups)
        self._num_tokens = self._mask.sum(0, dtype=torch.float64)
        self._all_valid = bool((self._num_tokens == len(self._mask)).all())
        if self.groups.tensor_rank == self.groups.pipeline_rank == 0:
            self.num_sequences += (self._num_tokens > 0).sum()

    def check(self, where: str) -> None:
        """See that all that was captured is finite. Once per micro-batch.

        Args:
            where: what to say of the micro-batch.

        Raises:
            DataError: it is not; the first place in the network is named.
        """
        bad = {axis: ~sums[1].sum(-1).isfinite() for axis, sums in self.sums.items()}
        if not torch.stack([flags.any() for flags in bad.values()]).any():
            return
        places = [(number, axis) for axis, flags in bad.items() for number in flags.nonzero().flatten().tolist()]
        # Norm p stands before sublayer p, and neurons and heads inside of theirs.
        inside = {"ffn": lambda n: 2 * n + 1.5, "head": lambda n: 2 * n + 0.5, "hidden": lambda n: n}
        place, axis = min((inside[axis](number), axis) for number, axis in places)
        layer = f"layer {int(place) // 2}" if place < len(self.shape.pattern) else "the final norm"
        raise DataError(
            f"activations of {layer} ({axis}) are not finite in {where}: score in another dtype, or look at that text"
        )

    def _score(self, x: Tensor, mask: Tensor, split_sequence: bool) -> Tensor:
        """Scores of the sequences that have valid tokens, `[batch, elements]`."""
        if not self._all_valid:
            x = x * mask.unsqueeze(-1).to(x.dtype)
        first, second = aggregate_sequence(x, self.how)
        if split_sequence:
            first, second = sum_over(torch.stack([first, second]), self.groups.collection.tp)
        valid = self._num_tokens > 0
        return sequence_score(first[valid], second[valid], self._num_tokens[valid], self.how)

    def _add(self, axis: str, number: int, score: Tensor, first_element: int = 0) -> None:
        sums = self.sums[axis][:, number, first_element : first_element + score.size(-1)]
        sums += torch.stack([score.sum(0), score.square().sum(0)])

    def _add_own(self, axis: str, number: int, x: Tensor) -> None:
        """Add what this tensor rank alone has, `[seq, batch, elements/tp]` of the whole sequence."""
        score = self._score(x, self._mask, split_sequence=False)
        self._add(axis, number, score, self.groups.tensor_rank * x.size(-1))

    def _add_heads(self, number: int, x: Tensor) -> None:
        self._add_own("head", number, x.unflatten(-1, (-1, self.shape.head_dim)).float().norm(dim=-1))

    def _add_inputs(self, number: int, output: tuple[Tensor, Tensor | None]) -> None:
        """Add what the first projection of an MLP gives, of a gated one the half that is its gate."""
        x, bias = output
        x = x if bias is None else x + bias
        self._add_own("ffn", number, x.chunk(2, dim=-1)[0] if self.shape.gated else x)

    def _add_channels(self, number: int, x: Tensor) -> None:
        split, is_first = self.groups.layout.sequence, self.groups.tensor_rank == 0
        if split or is_first:
            score = self._score(x, self._own_mask, split)
        if is_first:
            self._add("hidden", number, score)

    def _on_norm(self, norm, linear, number: int) -> None:
        if isinstance(norm, IdentityOp):
            self._before(
                linear,
                lambda x: self._add_channels(
                    number, normalize(x, linear.layer_norm_weight, linear.layer_norm_bias, linear.config)
                ),
            )
        else:
            self._after(norm, lambda x: self._add_channels(number, x))

    def _before(self, module, add) -> None:
        self._hooks.append(module.register_forward_pre_hook(lambda module, args: add(args[0])))

    def _after(self, module, add) -> None:
        self._hooks.append(module.register_forward_hook(lambda module, args, output: add(output)))


def own_tokens(loss_mask: Tensor, groups: Groups) -> Tensor:
    """The mask `[seq, batch]`, or this rank's part of it under sequence parallelism, of a mask `[batch, seq]`."""
    mask = loss_mask.transpose(0, 1)
    return mask.chunk(groups.layout.tensor, dim=0)[groups.tensor_rank] if groups.layout.sequence else mask
