"""Renders conversations with the tokenizer's chat template; only the assistant's tokens are learned."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError, meta
from jinja2.ext import loopcontrols

from minitron_megatron.data.rows import MESSAGES, REFERENCES, TOOLS, RowError
from minitron_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASSISTANT = "assistant"
_QUIETLY = {"verbose": False}  # no warning for conversations longer than the model's context
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
# What a template may raise for messages that it does not expect.
_REJECTIONS = (TemplateError, TypeError, LookupError, ValueError, AttributeError, RecursionError)


def template_columns(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the names of what the chat template reads beside the messages and may be a column of the text.

    Raises:
        DataError: the template is not valid.
    """
    given = tokenizer.chat_template or {}
    templates = given.values() if isinstance(given, dict) else [given]
    environment = Environment(extensions=[loopcontrols])
    names: set[str] = set()
    for template in templates:
        try:
            names |= meta.find_undeclared_variables(environment.parse(_MARKS.sub("", template)))
        except TemplateError as error:
            raise DataError(f"the tokenizer's chat template is not valid: {error}: fix chat_template.jinja") from error
    parameters = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {TOOLS, REFERENCES}
    made_by_transformers = {"raise_exception", "strftime_now", *tokenizer.special_tokens_map}
    return sorted(names - parameters - made_by_transformers - {MESSAGES})


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], where: str, extra: dict[str, object] | None = None
) -> tuple[list[int], list[int]]:
    """Returns the tokens of a conversation, and which of them are the assistant's.

    A template can mark answers with `{% generation %}`. Otherwise an answer is the text that is added when the
    conversation is rendered up to and including it, after the generation prompt.

    Args:
        tokenizer: with a chat template.
        messages: of the conversation.
        where: file and line, for errors.
        extra: what the template reads beside the messages.

    Returns:
        token ids, and a mask of 1 for those that are learned.

    Raises:
        DataError: there is no template.
        RowError: it rejects the messages, it renders earlier messages differently later, or no message is the
            assistant's.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a conversation, and the tokenizer has no chat template: put chat_template.jinja beside "
            f"tokenizer.json"
        )
    conversation = _Conversation(tokenizer, messages, where, extra or {})
    try:
        tokens, mask = conversation.marked() if conversation.is_marked else conversation.by_prefixes()
    except RowError:
        raise
    except _REJECTIONS as error:
        raise RowError(f"{where}: the chat template cannot render the messages: {error}") from error
    if not any(mask):
        raise RowError(
            f"{where}: no token is an assistant's answer, so that there is nothing to learn: "
            f"{conversation.why_nothing()}; leave it out"
        )
    return list(tokens), list(mask)


@dataclass
class _Conversation:
    """A conversation and its tokenizer; see `render_chat`."""

    tokenizer: PreTrainedTokenizerBase
    messages: list[dict]
    where: str
    extra: dict[str, object]

    @property
    def is_marked(self) -> bool:
        """Whether the template marks answers."""
        template = self.tokenizer.get_chat_template(tools=self.extra.get(TOOLS))
        return bool(_MARKS_ANSWERS.search(template))

    def marked(self) -> tuple[list[int], list[int]]:
        """Returns tokens and mask by the template's own marks."""
        rendered = self.tokenizer.apply_chat_template(
            self.messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs=_QUIETLY,
            **self.extra,
        )
        return rendered["input_ids"], rendered["assistant_masks"]

    def by_prefixes(self) -> tuple[list[int], list[int]]:
        """Returns tokens and mask, where an answer is what it adds to the conversation before it."""
        whole = self._render(len(self.messages))
        tokens = self._tokens(whole)
        mask = [0] * len(tokens)
        behind = 0  # end of the answer before, in the text
        for number, message in enumerate(self.messages):
            if message["role"] == _ASSISTANT:
                start, end = self._span(number, whole, behind)
                behind = end
                first, last = (self._tokens(whole[:position]) for position in (start, end))
                if tokens[: len(first)] == first and tokens[: len(last)] == last:
                    learned = range(len(first), len(last))
                else:
                    learned = self._overlapping(whole, start, end)
                for index in learned:
                    mask[index] = 1
        return tokens, mask

    def _render(self, count: int, prompt: bool = False) -> str:
        """Renders the first messages as text, with or without the prompt to answer."""
        return self.tokenizer.apply_chat_template(
            self.messages[:count], add_generation_prompt=prompt, tokenize=False, **self.extra
        )

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **_QUIETLY)["input_ids"]

    def _overlapping(self, whole: str, start: int, end: int) -> list[int]:
        """Returns the tokens of a part of the text, with one that begins in the prompt and goes on in the answer."""
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, **_QUIETLY)
        return [i for i, (first, last) in enumerate(encoded["offset_mapping"]) if first < end and last > start]

    def _span(self, number: int, whole: str, behind: int) -> tuple[int, int]:
        """Returns where the answer in a message begins and ends in the text of the whole conversation.

        Raises:
            RowError: it cannot be told.
        """
        try:
            after = self._end_in(whole, self._render(number + 1), number, "it")
        except _REJECTIONS as error:
            if isinstance(error, RowError):
                raise
            raise RowError(
                f"{self.where}: message {number} is the assistant's and cannot be told apart: the chat template does "
                f"not render the conversation up to it ({error}). Begin with a user's message, or give a chat template "
                f"with {{% generation %}} around the answers"
            ) from error
        try:
            before = self._render(number, prompt=True)
        except _REJECTIONS as error:  # such as of no message, where the assistant speaks first
            prompt = self._render(len(self.messages), prompt=True).removeprefix(whole).strip()
            start = whole.find(prompt, behind, after) if prompt else -1
            if start < 0:
                raise RowError(
                    f"{self.where}: message {number} is the assistant's and cannot be told apart: the chat template "
                    f"does not render what comes before it ({error}), and its prompt to answer is not in the text. "
                    f"Begin with a user's message, or give a chat template with {{% generation %}} around the answers"
                ) from error
            start += len(prompt)
            return start + len(whole[start:after]) - len(whole[start:after].lstrip()), after
        return self._end_in(whole, before, number, "the messages before it, with the prompt to answer,"), after

    def _end_in(self, whole: str, part: str, number: int, what: str) -> int:
        """Returns where the beginning of a conversation ends in the whole, white space at its end aside."""
        for end in (len(part), len(part.rstrip())):
            if whole[:end] == part[:end]:
                return end
        raise RowError(
            f"{self.where}: message {number} cannot be told apart: the conversation up to {what} is rendered otherwise "
            f"than in the whole. Give a chat template with {{% generation %}} around the answers"
        )

    def why_nothing(self) -> str:
        """Returns why no token is an answer."""
        roles = list(dict.fromkeys(message["role"] for message in self.messages))
        if _ASSISTANT not in roles:
            return f"the roles are {', '.join(roles)}, and none is {_ASSISTANT}"
        if not any(message.get("content") for message in self.messages if message["role"] == _ASSISTANT):
            return "the assistant's messages are empty"
        return "the chat template writes nothing for the assistant's messages, or marks none of it as an answer"
