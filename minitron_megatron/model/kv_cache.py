"""A key-value cache for generation: a new token costs one position instead of the whole sequence again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import Attention
from torch import Tensor

from minitron_megatron.model.build import held_sublayers
from minitron_megatron.model.network import Network


@dataclass
class NewTokens:
    """One new token of every sequence.

    Attributes:
        positions: of each in its sequence, `[batch]`.
        rows: numbers of the sequences, `[batch]`.
        mask: which positions each token attends to, `[batch, 1, 1, end]`.
    """

    positions: Tensor
    rows: Tensor
    mask: Tensor


@dataclass
class Cursor:
    """Where the tokens of the next forward pass stand in their sequences.

    Attributes:
        num_sequences: sequences that there is room for.
        length: of the longest one, in tokens.
        first: number of the sequence that the next prompts begin with.
        new: the next tokens, one per sequence; None for whole prompts, which begin at position 0.
    """

    num_sequences: int
    length: int
    first: int = 0
    new: NewTokens | None = None

    def begin_at(self, sequence: int) -> None:
        """Moves to the prompts of some of the sequences.

        Args:
            sequence: number of the first of them.
        """
        self.first = sequence

    def move_to(self, positions: Tensor) -> None:
        """Moves to one new token per sequence.

        Args:
            positions: of each in its sequence, `[batch]`.
        """
        rows = torch.arange(len(positions), device=positions.device)
        places = torch.arange(int(positions.max()) + 1, device=positions.device)
        self.new = NewTokens(positions, rows, mask=(places <= positions[:, None])[:, None, None])


@contextmanager
def key_value_cache(
    model_chunks: Sequence[GPTModel], network: Network, num_sequences: int, length: int
) -> Iterator[Cursor]:
    """Makes a model's layers cache what they need of earlier tokens while the block runs.

    A token's place in the cache is its position in its own sequence. Prompts are padded on the right, where causal
    attention does not see the padding, and generated tokens overwrite it. So prompts run through the model's own
    attention, and no sequence depends on those beside it.

    (Megatron-Core's StaticInferenceContext has one position for the whole batch, and applies the rotary embedding to
    all cached keys again for every new token.)

    Args:
        model_chunks: this rank's model, any GPTModel or HybridModel with rotary positions.
        network: the whole network.
        num_sequences: sequences to make room for.
        length: of the longest sequence, prompt and generated tokens.

    Yields:
        the cursor. Run the model first on prompts `[batch, seq]`, of some of the sequences after each `begin_at`, and
        then on tokens `[sequences, 1]` after each `move_to`.
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
def cached_attention(attention: Attention, cursor: Cursor) -> Iterator[None]:
    """Makes a Megatron-Core attention cache keys and values while the block runs."""
    core = attention.core_attention
    attention.core_attention = _CachedAttention(core, cursor, attention.config.softmax_scale)
    try:
        yield
    finally:
        attention.core_attention = core


def _angles_at(cursor: Cursor) -> Callable[[RotaryEmbedding, tuple[Any, ...], Tensor], Tensor]:
    """Returns a hook that gives the rotary angles of new tokens by their positions, `[1, batch, 1, rotated]`."""

    def hook(module: RotaryEmbedding, args: tuple[Any, ...], angles: Tensor) -> Tensor:
        if cursor.new is None:
            return angles
        return module.get_emb(cursor.length)[cursor.new.positions].transpose(0, 1)

    return hook


class _CachedAttention(torch.nn.Module):
    """The core attention of one sublayer, with a cache of keys and values `[sequences, groups/tp, length, head_dim]`.

    Args:
        core: attends within prompts.
        cursor: where new tokens stand.
        softmax_scale: factor of the scores; None for `head_dim ** -0.5`.
    """

    def __init__(self, core: torch.nn.Module, cursor: Cursor, softmax_scale: float | None):
        super().__init__()
        self.core, self.cursor, self.softmax_scale = core, cursor, softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Tensor:
        """See `CausalAttention.forward`; `seq` is 1 for new tokens."""
        new = self.cursor.new
        if new is None:
            seq, batch, groups, head_dim = key.shape
            if self.cursor.first == 0:
                # Zeros, because positions that no sequence has reached get the weight zero, and must not be NaN.
                size = (self.cursor.num_sequences, groups, self.cursor.length, head_dim)
                self.keys, self.values = key.new_zeros(size), value.new_zeros(size)
            rows = slice(self.cursor.first, self.cursor.first + batch)
            self.keys[rows, :, :seq], self.values[rows, :, :seq] = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
            return self.core(query, key, value, attention_mask, **options)
        at = (new.rows, slice(None), new.positions)
        self.keys[at], self.values[at] = key[0], value[0]
        seen = (slice(len(new.positions)), slice(None), slice(new.mask.size(-1)))
        context = F.scaled_dot_product_attention(
            # The query heads of a group, which share a key, as if they were the tokens of a sequence.
            query[0].unflatten(1, (key.size(2), -1)),
            self.keys[seen],
            self.values[seen],
            attn_mask=new.mask,
            scale=self.softmax_scale,
        )
        return context.flatten(1).unsqueeze(0)
