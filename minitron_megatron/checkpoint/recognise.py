"""Recognises what a path is that is not what was expected, and says the step that makes it so."""

import re
from pathlib import Path

_ITERATIONS = "latest_checkpointed_iteration.txt"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_BY_TORCH = (".bin", ".pt", ".pth", ".ckpt")


def hub_hint(path: str) -> str:
    """Returns how to get a model whose name on the hub was given for a path that does not exist; empty otherwise."""
    if not _HUB_NAME.fullmatch(path) or path.startswith(".") or Path(path).parent.exists():
        return ""
    return f"; if that is a name on the Hugging Face hub: hf download {path} --local-dir DIR, and name DIR"


def adapter_in(folder: Path) -> str | None:
    """Returns the name of a file in a folder that makes it an adapter over other weights; None without one."""
    return next((file.name for file in sorted(folder.glob("adapter_*")) if file.is_file()), None)


def folder_hint(folder: Path) -> str:
    """Returns what a folder without readable weights seems to be, and the next step; empty if it is not known."""
    names = sorted(path.name for path in folder.iterdir())
    if (folder / _ITERATIONS).is_file():
        return "it is a Megatron checkpoint already, and needs no import: name it where a checkpoint is meant"
    if adapter := adapter_in(folder):
        return merge_first(adapter)
    if (folder / "context").is_dir() and (folder / "weights").is_dir():
        return "it looks like a checkpoint of NeMo 2: export it first with `nemo llm export target=hf`"
    if any(re.match(r"model_world_size_\d+_rank_\d+\.pt$", name) for name in names) or "fsdp_config.json" in names:
        return "it looks like the shards of a verl run: merge them first with `python -m verl.model_merger merge`"
    if (folder / "actor").is_dir():
        return f"it looks like a checkpoint of verl: merge {folder / 'actor'} first with `python -m verl.model_merger`"
    if ggufs := [name for name in names if name.lower().endswith(".gguf")]:
        return f"it holds {ggufs[0]}: name that file"
    if any(name.startswith("consolidated") for name in names):
        return "consolidated files are Mistral's or Meta's own format: take the folder in Hugging Face's"
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return f"it holds {shards[0]}, and the index of such files is not there: copy model.safetensors.index.json too"
    if old := [name for name in names if name.endswith(_BY_TORCH)]:
        return f"it holds {old[0]}: load it with transformers, and save_pretrained() writes safetensors"
    inner = [name for name in names if (folder / name / "config.json").is_file()]
    return f"{inner[0]}/ in it has one: name that folder" if inner else ""


def merge_first(adapter: str) -> str:
    """Returns what to do with a folder that holds an adapter, by the name of its file."""
    return (
        f"{adapter} is of an adapter over other weights: merge it first, with merge_and_unload() of peft and "
        f"save_pretrained(), and name what that writes"
    )


def file_hint(path: Path) -> str:
    """Returns what a file that is no GGUF file seems to be, and the next step; empty if it is not known."""
    name = path.name.lower()
    with open(path, "rb") as file:
        start = file.read(16)
    if name.endswith(".safetensors") or start[8:10] == b'{"':
        return f"it is a safetensors file: name its folder, with config.json ({path.parent})"
    if name.endswith(".nemo"):
        return "it is a checkpoint of NeMo: convert it to a Hugging Face folder first, with NeMo's own export"
    if name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        return f"name its folder: {path.parent}"
    if name.endswith(_BY_TORCH) or start[:2] == b"PK":
        return "if torch.save wrote it, load it with transformers, and save_pretrained() writes a folder that is read"
    return ""


def is_gguf(path: Path) -> bool:
    """Returns whether a file is of GGUF by its content, or is called so."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"
