"""Conversations become tokens through the tokenizer's chat template, and only what the assistant says is learned."""

import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from minitron_megatron.errors import DataError

_ASSISTANT = "assistant"
_QUIETLY = {"verbose": False}  # also of a conversation that is longer than the model's context
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict], where: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of a conversation, and which of them are the assistant's.

    A template that marks answers with `{% generation %}` says it itself. Otherwise an answer is what rendering the
    conversation up to it adds to rendering what comes before, with the prompt to answer.

    Args:
        tokenizer: with a chat template.
        messages: of the conversation.
        where: it stands, for errors.

    Returns:
        token ids, and 1 for those that are learned, 0 for the others.

    Raises:
        DataError: there is no template, it refuses the messages or changes what it has written before, or the
            assistant says nothing.
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
