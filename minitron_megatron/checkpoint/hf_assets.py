"""The small files beside a network's weights: config, tokenizer, model card and licence."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from minitron_megatron.errors import CheckpointError
from minitron_megatron.files import read_json

# Files that are copied along with the weights, if present; the model card for its licence. Never weights or code.
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
    """Reads the `config.json` of a Hugging Face folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return read_json(folder / "config.json", "the whole config of a model")


def original_config(hf_assets: Path) -> dict:
    """Reads the `config.json` in a checkpoint's folder of Hugging Face files; empty if there is none."""
    return read_config(hf_assets) if (hf_assets / "config.json").is_file() else {}


def num_tokens(folder: Path, padded_vocab: int) -> int | None:
    """Returns the vocabulary size of a Hugging Face folder, from its config or else its tokenizer; None without both.

    Args:
        folder: that may hold them.
        padded_vocab: rows of the model's embedding table.

    Raises:
        CheckpointError: there are more tokens than rows.
    """
    if (config := folder / "config.json").is_file():
        where, count = config, read_config(folder).get("vocab_size")
    elif (tokenizer := folder / "tokenizer.json").is_file():
        where, count = tokenizer, 1 + max(Tokenizer.from_file(str(tokenizer)).get_vocab().values(), default=-1)
    else:
        return None
    if count is not None and count > padded_vocab:
        raise CheckpointError(
            f"{where} has {count} tokens, and the checkpoint an embedding table of {padded_vocab} rows: put the files "
            f"of the checkpoint's own model there"
        )
    return count


def copy_hf_assets(source: Path, target: Path) -> None:
    """Copies the content of the files of `HF_ASSETS` that exist into a new folder; theirs may be read-only."""
    target.mkdir(parents=True)
    for name in HF_ASSETS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
