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

A hook only sums over tokens. What follows is done for all places at once, when a micro-batch is through.
"""

from collections.abc import Mapping, Sequence

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from minitron_megatron.config.schema import Aggregation, Neurons
from minitron_megatron.model.local import normalize
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.groups import Groups
from minitron_megatron.parallel.schedule import own_tokens
from minitron_megatron.pruning.scores import aggregate_sequence, sequence_score


class Capture:
    """Sums importance while a model runs. A context manager: the hooks are there inside of it alone.

    Works with both layer specs: where Transformer Engine fuses a norm into the projection behind it, the
    norm's formula is applied to that module's input.

    Args:
        chunks: this rank's model.
        shape: of the whole network.
        groups: this rank's place.
        sequence_aggregation: over the tokens of a sequence, by axis.
        neurons: look at neurons after their activation and gate, or before.

    Attributes:
        sums: by axis, `[2, sublayer or norm, element]` in float64: the scores of all sequences so far, summed, and
            their squares. Norm p stands before sublayer p of the pattern, and the final one is last.
        num_sequences: with any valid token, so far.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        shape: ModelShape,
        groups: Groups,
        sequence_aggregation: Mapping[str, Aggregation],
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
        # Of the current micro-batch: by axis and place, the sums over this rank's tokens.
        self._found: dict[str, dict[int, Tensor]] = {axis: {} for axis in sizes}
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
                self._before(attention.linear_proj, lambda x, n=number: self._find_heads(n, x))
                if self.neurons is Neurons.AFTER:
                    self._before(mlp.linear_fc2, lambda x, n=number: self._find("ffn", n, x, self._mask))
                else:
                    self._after(mlp.linear_fc1, lambda output, n=number: self._find_inputs(n, output))
            if chunk.decoder.final_layernorm is not None:
                self._on_norm(chunk.decoder.final_layernorm, None, len(self.shape.pattern))
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def set_mask(self, loss_mask: Tensor) -> None:
        """Say which tokens, `[batch, seq]`, count in the forward pass to come. Before each micro-batch."""
        self._mask, self._own_mask = loss_mask.transpose(0, 1), own_tokens(loss_mask, self.groups)
        self._num_tokens = self._mask.sum(0, dtype=torch.float64)
        self._all_valid = bool((self._num_tokens == len(self._mask)).all())
        if self.groups.tensor_rank == self.groups.pipeline_rank == 0:
            self.num_sequences += (self._num_tokens > 0).sum()

    def add_up(self) -> Tensor:
        """Add the forward pass that is through to `sums`. After each micro-batch, on all tensor ranks.

        Returns:
            the first place in the network with an activation that is not finite, inf if there is none. Places are
            positions in the pattern: a norm stands at its sublayer's, heads and neurons half a step behind it.
        """
        faults = [torch.full((), torch.inf, dtype=torch.float64, device=self.groups.device)]
        for axis, found in self._found.items():
            if not found:
                continue
            numbers, together = list(found), torch.stack(list(found.values()))
            found.clear()
            if axis == "hidden" and self.groups.layout.sequence:
                sum_over(together, self.groups.collection.tp)
            # A sequence without valid tokens has sums, and then a score, of 0.
            score = sequence_score(*together.unbind(1), self._num_tokens.clamp(min=1), self.how[axis])
            sums = torch.stack([score.sum(1), score.square().sum(1)])
            places = torch.tensor(numbers, device=sums.device, dtype=sums.dtype)
            places = {"hidden": places, "head": 2 * places + 0.5, "ffn": 2 * places + 1.5}[axis]
            faults.append(places.where(~sums[1].sum(-1).isfinite(), torch.inf).min())
            if axis != "hidden":
                first = self.groups.tensor_rank * sums.size(-1)
                self.sums[axis][:, numbers, first : first + sums.size(-1)] += sums
            elif self.groups.tensor_rank == 0:
                self.sums[axis][:, numbers] += sums
        return torch.stack(faults).min()

    def _find(self, axis: str, number: int, x: Tensor, mask: Tensor) -> None:
        """Sum `[seq, batch, elements]` over the tokens that count."""
        if not self._all_valid:
            x = x * mask.unsqueeze(-1).to(x.dtype)
        self._found[axis][number] = aggregate_sequence(x, self.how[axis])

    def _find_heads(self, number: int, x: Tensor) -> None:
        heads = x.unflatten(-1, (-1, self.shape.head_dim)).float().norm(dim=-1)
        self._find("head", number, heads, self._mask)

    def _find_inputs(self, number: int, output: tuple[Tensor, Tensor | None]) -> None:
        """What the first projection of an MLP gives, of a gated one the half that is its gate."""
        x, bias = output
        x = x if bias is None else x + bias
        self._find("ffn", number, x.chunk(2, dim=-1)[0] if self.shape.gated else x, self._mask)

    def _find_channels(self, number: int, x: Tensor) -> None:
        # Without sequence parallelism all tensor ranks have the same.
        if self.groups.layout.sequence or self.groups.tensor_rank == 0:
            self._find("hidden", number, x, self._own_mask)

    def _on_norm(self, norm, linear, number: int) -> None:
        if isinstance(norm, IdentityOp):
            self._before(
                linear,
                lambda x: self._find_channels(
                    number, normalize(x, linear.layer_norm_weight, linear.layer_norm_bias, linear.config)
                ),
            )
        else:
            self._after(norm, lambda x: self._find_channels(number, x))

    def _before(self, module, add) -> None:
        self._hooks.append(module.register_forward_pre_hook(lambda module, args: add(args[0])))

    def _after(self, module, add) -> None:
        self._hooks.append(module.register_forward_hook(lambda module, args, output: add(output)))


def place_name(place: float, shape: ModelShape) -> str:
    """What to say of a place that `Capture.add_up` found."""
    if place == len(shape.pattern):
        return "activations of the final norm (hidden)"
    axis = {0: "hidden", 0.5: "head", 1.5: "ffn"}[place % 2 if place % 1 else 0]
    return f"activations of layer {int(place) // 2} ({axis})"
