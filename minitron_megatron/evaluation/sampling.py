"""Sampling parameters, the choice of tokens from logits, and stop criteria."""

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
        max_new_tokens: most new tokens per sequence.
        min_new_tokens: fewest new tokens before an end token.
        stop: strings that end a sequence.
        sample: sample tokens; otherwise decode greedily.
        temperature: sampling temperature.
        top_k: sample from the top-k tokens; None or 0 for all.
        top_p: sample from the most likely tokens whose probabilities sum to this; None for all.
        min_p: sample from tokens with at least this fraction of the highest probability; None for all.
        seed: of the random generator.
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
    """Chooses the next tokens of a batch; equal logits give equal tokens on any rank.

    Args:
        params: how to choose.
        end_tokens: tokens that end a sequence.
        batch_number: added to the seed.
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
            logits: float32 `[batch, vocab]`; modified.
            num_made: number of tokens generated before.
        """
        if num_made < self.params.min_new_tokens:
            logits[:, self.end_tokens] = -torch.inf
        if not self.params.sample:
            return logits.argmax(-1)
        for warper in self.warpers:
            logits = warper(None, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]


class StopCriteria:
    """Decides whether a sequence has ended.

    Args:
        params: with the stop strings.
        end_tokens: tokens that end a sequence.
        tokenizer: of transformers.
    """

    def __init__(self, params: SamplingParams, end_tokens: list[int], tokenizer: PreTrainedTokenizerBase):
        self.max_new_tokens, self.stop = params.max_new_tokens, [text for text in params.stop if text]
        self.end_tokens, self.tokenizer = set(end_tokens), tokenizer
        # A token is at least one byte, so a stop string has at most as many tokens as bytes.
        self.num_tail = max((len(text.encode()) for text in self.stop), default=0) + 1

    def __call__(self, made: list[int]) -> bool:
        """Returns whether the sequence ends with the last of the generated tokens."""
        if len(made) >= self.max_new_tokens or made[-1] in self.end_tokens:
            return True
        if not self.stop:
            return False
        tail = self.tokenizer.decode(made[-self.num_tail :])
        return any(text in tail for text in self.stop)
