"""The small files beside a network's weights: config, tokenizer, and what the model's authors say of it."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from minitron_megatron.artifacts.files import read_json
from minitron_megatron.errors import CheckpointError

# What travels beside the weights, where it is there: the model card for what it says of the licence. Weights and code
# never do.
HF_ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
    "NOTICE.txt",
    "USE_POLICY.md",
)


def read_config(folder: Path) -> dict:
    """The `config.json` of a Hugging Face folder.

    Raises:
        CheckpointError: it is not there, or not whole.
    """
    return read_json(folder / "config.json", "the whole config of a model")


def original_config(hf_assets: Path) -> dict:
    """The `config.json` that travels with a checkpoint; empty where none does."""
    return read_config(hf_assets) if (hf_assets / "config.json").is_file() else {}


def num_tokens(folder: Path, padded_vocab: int) -> int | None:
    """How many tokens the model of a Hugging Face folder has, by its config or else its tokenizer; None without both.

    Args:
        folder: that may hold them.
        padded_vocab: rows of the embedding table that they are for.

    Raises:
        CheckpointError: there are more tokens than rows.
    """
    if (config := folder / "config.json").is_file():
        where, found = config, read_config(folder).get("vocab_size")
    elif (tokenizer := folder / "tokenizer.json").is_file():
        where, found = tokenizer, 1 + max(Tokenizer.from_file(str(tokenizer)).get_vocab().values(), default=-1)
    else:
        return None
    if found is not None and found > padded_vocab:
        raise CheckpointError(
            f"{where} has {found} tokens, and the checkpoint an embedding table of {padded_vocab} rows: put the files "
            f"of the checkpoint's own model there"
        )
    return found


def copy_hf_assets(source: Path, target: Path) -> None:
    """Copy tokenizer and config, the small files beside the weights, into a new folder."""
    target.mkdir(parents=True)
    for name in HF_ASSETS:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
