"""Multiple-choice questions: a JSON-lines file of `context`, `choices` and `answer`, as samples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minitron_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Question:
    """One question.

    Attributes:
        context: the text before the choices.
        choices: possible continuations. A space between context and choice counts to the choice, on whichever side it
            is written, because tokenizers join it to the following word.
        answer: index of the right choice.
        where: file and line, for errors.
    """

    context: str
    choices: list[str]
    answer: int
    where: str = "a question"


def read_questions(path: Path) -> list[Question]:
    """Reads a file of questions.

    Raises:
        DataError: the file is missing or empty, or a line is malformed; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON's texts may hold other ends of lines
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"choices = {path} cannot be read: {e}") from e
    questions = [
        _read_line(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not questions:
        raise DataError(f"choices = {path} is empty: give a line of JSON with context, choices and answer per question")
    return questions


def _read_line(where: str, line: str) -> Question:
    try:
        values = json.loads(line)
        question = Question(values["context"], values["choices"], values["answer"], where)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"{where} is not JSON with context, choices and answer: {e!r}") from e
    if not isinstance(question.context, str) or not question.context.strip():
        raise DataError(f"{where}: context = {question.context!r} must be text, and more than spaces")
    texts = question.choices if isinstance(question.choices, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"{where}: choices = {question.choices!r} must be a list of at least two texts, none empty")
    if type(question.answer) is not int or not 0 <= question.answer < len(texts):
        raise DataError(
            f"{where}: answer = {question.answer!r} must be the index of one of the {len(texts)} choices, from 0"
        )
    return question


class ChoiceSamples:
    """A sample per choice: context and choice, where only the tokens of the choice are predicted.

    Args:
        questions: see `read_questions`.
        tokenizer: of transformers.
        multiple: pad sequences to a multiple of this many tokens.

    Attributes:
        sequence_length: of every sample.

    Raises:
        DataError: a choice adds no token to its context.
    """

    def __init__(self, questions: list[Question], tokenizer: PreTrainedTokenizerBase, multiple: int):
        self.questions = questions
        self.rows: list[tuple[list[int], int]] = []
        for question in questions:
            context = len(tokenizer(question.context.rstrip(), add_special_tokens=False)["input_ids"])
            for choice in question.choices:
                tokens = tokenizer(question.context + choice, add_special_tokens=False)["input_ids"]
                if len(tokens) <= context:
                    raise DataError(f"{question.where}: choice {choice!r} adds no token to its context")
                self.rows.append((tokens, context))
        longest = max(len(tokens) for tokens, _ in self.rows) - 1
        self.sequence_length = -(-longest // multiple) * multiple

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, context = self.rows[index]
        padded = torch.zeros(self.sequence_length + 1, dtype=torch.int64)
        padded[: len(tokens)] = torch.tensor(tokens)
        positions = torch.arange(self.sequence_length)
        return {
            "tokens": padded[:-1],
            "labels": padded[1:],
            "loss_mask": ((positions >= context - 1) & (positions < len(tokens) - 1)).float(),
            "position_ids": positions,
            "row": torch.tensor(index),
        }

    def accuracy(self, losses: Tensor) -> float:
        """Returns the share of questions whose right choice is the most likely.

        Args:
            losses: of every sample, summed over the tokens of its choice, in nats `[sample]`.
        """
        right = 0
        for question, own in zip(self.questions, losses.split([len(q.choices) for q in self.questions]), strict=True):
            right += int(own.argmin()) == question.answer
        return right / len(self.questions)
