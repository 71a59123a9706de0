"""Checks the small files of a source at import, and that an export gives the tokens of its source."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from minitron_megatron.checkpoint.hf_assets import original_config
from minitron_megatron.checkpoint.model_card import CARD, license_of
from minitron_megatron.data.encoding import load_tokenizer
from minitron_megatron.errors import CheckpointError
from minitron_megatron.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FAST, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_FILES = (_FAST, "tokenizer.model", "vocab.json")
_FILES_TO_NAME = f"{_FAST} and {_SETTINGS}, as a fast tokenizer's save_pretrained() writes them"
# Digits, spaces, other scripts, and what tokenizers split in ways of their own; special tokens are put between.
_PIECES = (
    " leading space",
    "  two, and\ttabs\n\n lines\r\n",
    "1234567890 3.14 2024-11-29 ",
    "it's WE'LL don’t",
    "naïve Zürich e\u0301 ﬁ ½",
    "日本語のテキスト 中文 한국어",
    "עברית العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧 \u200b\u00a0",
    "x=[{'a':1}]; // <b>&amp;</b> ",
    "trailing ",
)


def check_assets(folder: Path, vocab_size: int, is_converted: bool = False) -> None:
    """Checks what later verbs need of the files beside the weights: tokenizer, config and model card.

    Args:
        folder: with the files.
        vocab_size: of the network.
        is_converted: transformers has made them of a GGUF file, and may have added its classes' own tokens.

    Raises:
        CheckpointError: no fast tokenizer can be loaded, it has no end-of-sequence token, it names special tokens that
            it does not have, or ids beyond the vocabulary; or the card's front matter cannot be read.
    """
    license_of(folder / CARD)
    for name, value in original_config(folder).items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and any(type(one) is int and one >= vocab_size for one in ids):
            raise CheckpointError(
                f"config.json: {name} = {value} is not in the vocabulary of vocab_size = {vocab_size}: correct it"
            )
    if not (folder / _FAST).is_file():
        raise CheckpointError(f"the model has no fast tokenizer: put {_FILES_TO_NAME}, beside its weights")
    tokenizer = _loaded(folder)
    vocabulary = _vocabulary(folder, is_converted)
    if not is_converted:
        _require_named(folder, vocabulary)
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer's token {token!r} has id {largest}, so that it has {largest + 1} tokens, and the network "
            f"vocab_size = {vocab_size}: take the tokenizer of this model, or the token out of it"
        )
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer has no end-of-sequence token: name one as eos_token in {_SETTINGS}")


def keep_tokens(source: Path, target: Path) -> None:
    """Makes a copy of a tokenizer beside another config give the tokens of the source.

    transformers chooses the tokenizer's class by the model's as well. Where that changes tokens, the class that reads
    `tokenizer.json` as it stands takes its place.

    Raises:
        CheckpointError: it gives other tokens all the same.
    """
    if not any((source / name).is_file() for name in _FILES):
        return
    before = _loaded(source)
    if _sample(before) == _try_sample(target):
        return
    if (backend := getattr(before, "backend_tokenizer", None)) is not None:
        backend.save(str(target / _FAST))
    settings = _values(target / _SETTINGS)
    special = {name: str(token) for name, token in before.special_tokens_map.items() if isinstance(token, str)}
    write_json(target / _SETTINGS, {**settings, **special, "tokenizer_class": "PreTrainedTokenizerFast"})
    if _sample(before) != _try_sample(target):
        raise CheckpointError(
            f"the tokenizer in {source} gives other tokens beside the exported config: save it with "
            f"PreTrainedTokenizerFast's save_pretrained() there"
        )


def _loaded(folder: Path) -> PreTrainedTokenizerBase:
    own = _values(folder / _SETTINGS).get("auto_map") or {}
    if own and (not isinstance(own, dict) or own.get("AutoTokenizer")):
        raise CheckpointError(
            f"the model's tokenizer is a class with code of its own, which is not run ({_SETTINGS}: auto_map = {own}): "
            f"put {_FILES_TO_NAME} beside the weights, and take auto_map out"
        )
    try:
        return load_tokenizer(folder)
    except Exception as e:  # tokenizers raise exceptions of many types, and plain ones
        reason = str(e).strip().split("\n")[0]
        raise CheckpointError(
            f"the model's tokenizer cannot be loaded: put {_FILES_TO_NAME} "
            f"beside the weights ({type(e).__name__}: {reason})"
        ) from e


def _vocabulary(folder: Path, is_converted: bool) -> dict[str, int]:
    """Returns the ids of a tokenizer's tokens by its files, without those that its class adds in loading."""
    if is_converted:
        return Tokenizer.from_file(str(folder / _FAST)).get_vocab(with_added_tokens=False)
    added = _values(folder / _SETTINGS).get("added_tokens_decoder") or {}
    return {
        **Tokenizer.from_file(str(folder / _FAST)).get_vocab(),
        **{token["content"]: int(number) for number, token in added.items()},
        **_values(folder / "added_tokens.json"),
    }


def _require_named(folder: Path, vocabulary: Collection[str]) -> None:
    """Refuses special tokens of which only the names are known: loading would give them ids at the end."""
    for file in (_SETTINGS, "special_tokens_map.json"):
        for name, value in _values(folder / file).items():
            values = value if isinstance(value, list) else [value]
            if not name.endswith("_token") and name != "additional_special_tokens":
                continue
            tokens = [one.get("content") if isinstance(one, dict) else one for one in values]
            if missing := [token for token in tokens if isinstance(token, str) and token not in vocabulary]:
                raise CheckpointError(
                    f"{file}: {name} = {missing[0]!r} is none of the {len(vocabulary)} tokens of the tokenizer: name "
                    f"one that is"
                )


def _values(path: Path) -> dict[str, Any]:
    return read_json(path, "a tokenizer's settings") if path.is_file() else {}


def _sample(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the tokens of a text that is hard to tokenise, with and without the tokens that its class adds."""
    special = [token for token in dict.fromkeys(tokenizer.all_special_tokens) if token]
    text = "".join(piece + special[n % len(special)] if special else piece for n, piece in enumerate(_PIECES))
    texts = [text, *_PIECES]
    return json.dumps(
        [tokenizer(one, add_special_tokens=add)["input_ids"] for one in texts for add in (False, True)]
        + [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id]
    )


def _try_sample(folder: Path) -> str | None:
    try:
        return _sample(load_tokenizer(folder))
    except Exception:  # of many types: the tokenizer is then rewritten
        return None
