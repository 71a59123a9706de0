"""A key-value cache for generation: each new token costs one position, and not all of those before it again."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from minitron_megatron.model.build import held_sublayers
from minitron_megatron.model.network import Network


@dataclass
class Cursor:
    """Where the tokens of the next forward pass stand in their sequences.

    Attributes:
        num_sequences, length: that there is room for, and of the longest one, in tokens.
        first: number of the sequence that the next prompts begin with.
        positions: of one new token per sequence `[batch]`; None for whole prompts, which begin at 0.
        rows: numbers of the sequences `[batch]`.
        seen: which positions each of them attends to `[batch, 1, 1, end]`.
    """

    num_sequences: int
    length: int
    first: int = 0
    positions: Tensor | None = None
    rows: Tensor | None = None
    seen: Tensor | None = None

    def begin_at(self, sequence: int) -> None:
        """Stand at the prompts of some of the sequences."""
        self.first = sequence

    def move_to(self, positions: Tensor) -> None:
        """Stand at one new token per sequence."""
        self.positions = positions
        self.rows = torch.arange(len(positions), device=positions.device)
        places = torch.arange(int(positions.max()) + 1, device=positions.device)
        self.seen = (places <= positions[:, None])[:, None, None]


@contextmanager
def key_value_cache(
    model_chunks: Sequence[torch.nn.Module], network: Network, num_sequences: int, length: int
) -> Iterator[Cursor]:
    """Have a model's layers remember what they need of earlier tokens while the block runs.

    The place of a token in the cache is its position in its own sequence. Prompts are padded on the right, where causal
    attention does not see the padding, and what a sequence goes on with overwrites it. So the prompts run through the
    model's own attention, and no sequence depends on those beside it.

    (Megatron-Core's StaticInferenceContext has one position for the whole batch, and turns all keys of the cache by
    their rotary angles again for every new token.)

    Args:
        model_chunks: this rank's model, anybody's GPTModel or HybridModel with rotary positions.
        network: the whole network.
        num_sequences: that there is room for.
        length: longest sequence, prompt and what follows it, in tokens.

    Yields:
        the cursor. The model takes prompts `[batch, seq]` first, of some of the sequences after each `begin_at`, and
        after each `move_to` tokens `[sequences, 1]`.
    """
    cursor = Cursor(num_sequences, length)
    with ExitStack() as stack:
        for chunk in model_chunks:
            hook = chunk.rotary_pos_emb.register_forward_hook(_angles_at(cursor))
            stack.callback(hook.remove)
            for positions, layer in held_sublayers(chunk, network):
                for position in positions:
                    stack.enter_context(network.sublayers[position].caching(layer, cursor))
        yield cursor


@contextmanager
def cached_attention(attention: torch.nn.Module, cursor: Cursor) -> Iterator[None]:
    """Have an attention of Megatron-Core's remember keys and values while the block runs."""
    core = attention.core_attention
    attention.core_attention = _CachedAttention(core, cursor, attention.config.softmax_scale)
    try:
        yield
    finally:
        attention.core_attention = core


def _angles_at(cursor: Cursor):
    """A hook that gives the rotary angles of the cursor's positions, `[1, batch, 1, rotated]`, instead of the first."""

    def hook(module: RotaryEmbedding, args: tuple, angles: Tensor) -> Tensor:
        if cursor.positions is None:
            return angles
        return module.get_emb(cursor.length)[cursor.positions].transpose(0, 1)

    return hook


class _CachedAttention(torch.nn.Module):
    """The attention of one sublayer, with the keys and values `[sequences, groups/tp, length, head_dim]` seen.

    Args:
        core: attends within prompts.
        cursor: where new tokens stand.
        softmax_scale: that scores are multiplied by; None for `head_dim ** -0.5`.
    """

    def __init__(self, core: torch.nn.Module, cursor: Cursor, softmax_scale: float | None):
        super().__init__()
        self.core, self.cursor, self.softmax_scale = core, cursor, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options) -> Tensor:
        """See `CausalAttention.forward`; `seq` is 1 once the prompts have been seen."""
        positions = self.cursor.positions
        if positions is None:
            seq, batch, groups, head_dim = key.shape
            if self.cursor.first == 0:
                # Zeros, for what no sequence has reached is multiplied by zero, and may not be NaN.
                size = (self.cursor.num_sequences, groups, self.cursor.length, head_dim)
                self.keys, self.values = key.new_zeros(size), value.new_zeros(size)
            rows = slice(self.cursor.first, self.cursor.first + batch)
            self.keys[rows, :, :seq], self.values[rows, :, :seq] = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
            return self.core(query, key, value, attention_mask, **options)
        at = (self.cursor.rows, slice(None), positions)
        self.keys[at], self.values[at] = key[0], value[0]
        seen = (slice(len(positions)), slice(None), slice(self.cursor.seen.size(-1)))
        context = F.scaled_dot_product_attention(
            # The query heads of a group, which share a key, as if they were the tokens of a sequence.
            query[0].unflatten(1, (key.size(2), -1)),
            self.keys[seen],
            self.values[seen],
            attn_mask=self.cursor.seen,
            scale=self.softmax_scale,
        )
        return context.flatten(1).unsqueeze(0)
