"""How tokens are chosen from logits, and when a text ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class SamplingParams:
    """How sequences are continued.

    Attributes:
        max_new_tokens: of each sequence, at most.
        min_new_tokens: before so many, no end token is chosen.
        stop: texts that end a sequence once they are written.
        sample: draw tokens; else the likeliest is taken.
        temperature: that logits are divided by, when drawing.
        top_k: draw from so many of the likeliest; None or 0 for all.
        top_p: draw from the likeliest that have this much of the probability together; None for all.
        min_p: draw from those that have this share of the likeliest one's probability; None for all.
        seed: of the draws.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 1234


class Sampler:
    """Chooses a batch's next tokens, the same ones wherever the logits are the same.

    Args:
        params: how.
        end_tokens: that end a sequence.
        batch_number: every batch draws differently.
        device: of the logits.
    """

    def __init__(self, params: SamplingParams, end_tokens: list[int], batch_number: int, device: torch.device):
        from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.params, self.end_tokens = params, end_tokens
        self.generator = torch.Generator(device).manual_seed(params.seed + batch_number)
        warpers = {
            TemperatureLogitsWarper: params.temperature,
            TopKLogitsWarper: params.top_k or None,
            TopPLogitsWarper: params.top_p,
            MinPLogitsWarper: params.min_p,
        }
        self.warpers = [kind(value) for kind, value in warpers.items() if params.sample and value is not None]

    def __call__(self, logits: Tensor, num_made: int) -> Tensor:
        """Chooses the next tokens `[batch]`.

        Args:
            logits: float32 `[batch, vocab]`; changed.
            num_made: tokens that were chosen before.
        """
        if num_made < self.params.min_new_tokens:
            logits[:, self.end_tokens] = -torch.inf
        if not self.params.sample:
            return logits.argmax(-1)
        for warper in self.warpers:
            logits = warper(None, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]


class StopCriteria:
    """Tells whether a sequence has ended.

    Args:
        params: with the texts to stop at.
        end_tokens: that end a sequence.
        tokenizer: of transformers.
    """

    def __init__(self, params: SamplingParams, end_tokens: list[int], tokenizer: PreTrainedTokenizerBase):
        self.max_new_tokens, self.stop = params.max_new_tokens, [text for text in params.stop if text]
        self.end_tokens, self.tokenizer = set(end_tokens), tokenizer
        # A token writes at least one byte, so that a text is complete within so many.
        self.num_tail = max((len(text.encode()) for text in self.stop), default=0) + 1

    def __call__(self, made: list[int]) -> bool:
        """Returns whether the sequence ends with the last of the generated tokens."""
        if len(made) >= self.max_new_tokens or made[-1] in self.end_tokens:
            return True
        if not self.stop:
            return False
        tail = self.tokenizer.decode(made[-self.num_tail :])
        return any(text in tail for text in self.stop)
