"""Renders conversations with the tokenizer's chat template; only the assistant's tokens are learned."""

import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from minitron_megatron.errors import DataError

_ASSISTANT = "assistant"
_QUIETLY = {"verbose": False}  # no warning for conversations longer than the model's context
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict], where: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of a conversation, and which of them are the assistant's.

    A template can mark answers with `{% generation %}`. Otherwise an answer is the text that is added when the
    conversation is rendered up to and including it, after the generation prompt.

    Args:
        tokenizer: with a chat template.
        messages: of the conversation.
        where: file and line, for errors.

    Returns:
        token ids, and a mask of 1 for those that are learned.

    Raises:
        DataError: there is no template, it rejects the messages, it renders earlier messages differently later, or no
            message is the assistant's.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a conversation, and the tokenizer has no chat template: put chat_template.jinja beside "
            f"tokenizer.json"
        )
    try:
        if _MARKS_ANSWERS.search(tokenizer.get_chat_template()):
            rendered = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=_QUIETLY
            )
            tokens, mask = rendered["input_ids"], rendered["assistant_masks"]
        else:
            tokens, mask = _by_prefixes(tokenizer, messages, where)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: the chat template cannot render the messages: {error}") from error
    if not any(mask):
        raise DataError(f"{where}: no token is an assistant's answer, so that there is nothing to learn: leave it out")
    return list(tokens), list(mask)


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, messages: list[dict], where: str) -> tuple[list[int], list[int]]:
    def render(count: int, prompt: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(
            messages[:count], add_generation_prompt=prompt, return_dict=True, tokenizer_kwargs=_QUIETLY
        )["input_ids"]

    tokens = render(len(messages))
    mask = [0] * len(tokens)
    for number, message in enumerate(messages):
        if message["role"] != _ASSISTANT:
            continue
        before, after = render(number, prompt=True), render(number + 1)
        for part, what in ((before, "the messages before it, with the prompt to answer,"), (after, "it")):
            if tokens[: len(part)] != part:
                raise DataError(
                    f"{where}: message {number} cannot be told apart: the conversation up to {what} is rendered "
                    f"otherwise than in the whole. Give a chat template with {{% generation %}} around the answers"
                )
        mask[len(before) : len(after)] = [1] * (len(after) - len(before))
    return tokens, mask
