"""Capturing activations: hooks on a running Megatron-Core model that sum up importance as it goes.

Each rank sums what it sees. Which ranks hold parts of the same number is known per axis:

| axis   | captured at                              | split over            | summed over                        |
|--------|------------------------------------------|-----------------------|------------------------------------|
| hidden | output of every norm                     | nothing               | data; tensor with sequence parallel |
| ffn    | input of the MLP's second projection     | tensor (its neurons)  | data                               |
| head   | input of the attention output projection | tensor (its groups)   | data                               |
| layer  | input and output of every layer          | nothing               | data; tensor with sequence parallel |

So the scores are those of the model and not of the layout.
"""

from collections.abc import Sequence

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from minitron_megatron.config.schema import Aggregation
from minitron_megatron.model.build import Backbone
from minitron_megatron.model.local import normalize
from minitron_megatron.model.shape import ModelShape
from minitron_megatron.parallel.collectives import gather_dim, gather_objects, sum_over
from minitron_megatron.parallel.groups import Groups
from minitron_megatron.pruning.scores import Moments, Scores, aggregate_sequence, sequence_score


class Capture:
    """Sums importance while a model runs. A context manager: the hooks are gone when it ends.

    Works with both layer specs: where Transformer Engine fuses a norm into the projection behind it, the
    norm's formula is applied to that module's input.

    Args:
        chunks: this rank's model.
        shape: of the whole network.
        groups: this rank's place.
        sequence_aggregation: over the tokens of a sequence.
    """

    def __init__(
        self, chunks: Sequence[Backbone], shape: ModelShape, groups: Groups, sequence_aggregation: Aggregation
    ):
        self.chunks = chunks
        self.shape = shape
        self.groups = groups
        self.how = sequence_aggregation
        self.num_sequences = torch.zeros((), dtype=torch.float64)
        # Keys are (axis, number of the layer); the two norms of layer i are 2i and 2i+1, the final one is last.
        self.moments: dict[tuple[str, int], Moments] = {}
        self.cosines: dict[int, Tensor] = {}
        self._mask: Tensor | None = None  # of the whole sequence, [seq, batch]
        self._own_mask: Tensor | None = None  # of this rank's part of it under sequence parallelism
        self._num_tokens: Tensor | None = None
        self._hooks: list = []

    def __enter__(self) -> "Capture":
        for chunk in self.chunks:
            for layer in chunk.decoder.layers:
                number = layer.layer_number - 1
                attention, mlp = layer.self_attention, layer.mlp
                self._on_norm(layer.input_layernorm, attention.linear_qkv, 2 * number)
                self._on_norm(layer.pre_mlp_layernorm, mlp.linear_fc1, 2 * number + 1)
                self._on_input(attention.linear_proj, "head", number)
                self._on_input(mlp.linear_fc2, "ffn", number)
                self._hooks.append(layer.register_forward_hook(self._layer_hook(number), with_kwargs=True))
            if chunk.decoder.final_layernorm is not None:
                self._on_norm(chunk.decoder.final_layernorm, None, 2 * self.shape.num_layers)
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def count(self, loss_mask: Tensor) -> None:
        """Count the sequences of a micro-batch `[batch, seq]` that have any valid token. Once per micro-batch."""
        self.num_sequences += (loss_mask.sum(1) > 0).sum().cpu()

    def set_mask(self, loss_mask: Tensor) -> None:
        """Say which tokens, `[batch, seq]`, count in the forward pass to come. Once per pass of a chunk."""
        mask = loss_mask.transpose(0, 1)
        self._num_tokens = mask.sum(0, dtype=torch.float64)
        self._mask = self._own_mask = mask
        if self.groups.layout.sequence:
            self._own_mask = mask.chunk(self.groups.layout.tensor, dim=0)[self.groups.tensor_rank]

    def scores(self, batch_aggregation: Aggregation) -> Scores:
        """Aggregate what all ranks have seen. Collective: every rank calls it and gets the same scores."""
        groups = self.groups
        for moments in self.moments.values():
            sum_over(moments.first, groups.collection.dp)
            sum_over(moments.second, groups.collection.dp)
        for cosines in self.cosines.values():
            sum_over(cosines, groups.collection.dp)
        num_sequences = int(sum_over(self.num_sequences.clone(), groups.collection.dp))

        own = {key: moments.aggregate(num_sequences, batch_aggregation) for key, moments in self.moments.items()}
        for (axis, number), value in own.items():
            if axis != "hidden":
                own[axis, number] = gather_dim(value, groups.collection.tp, dim=0)
        own |= {("layer", number): 1 - total / count for number, (total, count) in self.cosines.items()}
        merged = {}
        for part in gather_objects(own, groups.collection.pp):
            merged |= part

        def stack(axis: str) -> Tensor:
            numbers = sorted(number for name, number in merged if name == axis)
            return torch.stack([merged[axis, number] for number in numbers])

        shape = self.shape
        return Scores(
            shape=shape,
            hidden=stack("hidden").sum(0),
            ffn=stack("ffn"),
            head=stack("head").view(-1, shape.num_query_groups, shape.heads_per_group),
            layer=stack("layer"),
        )

    def _add(self, axis: str, number: int, x: Tensor, mask: Tensor, split_sequence: bool) -> None:
        first, second = aggregate_sequence(x, mask, self.how)
        if split_sequence:
            first, second = sum_over(torch.stack([first, second]), self.groups.collection.tp)
        valid = self._num_tokens > 0
        score = sequence_score(first[valid], second[valid], self._num_tokens[valid], self.how)
        self.moments.setdefault((axis, number), Moments.zeros(score.size(-1))).add(score)

    def _on_norm(self, norm, linear, number: int) -> None:
        def add(x: Tensor) -> None:
            self._add("hidden", number, x, self._own_mask, split_sequence=self.groups.layout.sequence)

        if isinstance(norm, IdentityOp):

            def before_fused(module, args):
                add(normalize(args[0], module.layer_norm_weight, module.layer_norm_bias, module.config))

            self._hooks.append(linear.register_forward_pre_hook(before_fused))
        else:
            self._hooks.append(norm.register_forward_hook(lambda module, args, output: add(output)))

    def _on_input(self, linear, axis: str, number: int) -> None:
        head_dim = self.shape.head_dim

        def before(module, args):
            x = args[0]
            if axis == "head":
                x = x.view(*x.shape[:2], -1, head_dim).float().norm(dim=-1)
            # Between the two projections of a sublayer every rank holds the whole sequence.
            self._add(axis, number, x, self._mask, split_sequence=False)

        self._hooks.append(linear.register_forward_pre_hook(before))

    def _layer_hook(self, number: int):
        def after(module, args, kwargs, output):
            before = (args[0] if args else kwargs["hidden_states"]).float()
            after = (output[0] if isinstance(output, tuple) else output).float()
            cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
            sums = torch.stack([(cosine * self._own_mask).sum(), self._own_mask.sum()]).double()
            if self.groups.layout.sequence:
                sum_over(sums, self.groups.collection.tp)
            self.cosines[number] = self.cosines.get(number, 0) + sums.cpu()

        return after
