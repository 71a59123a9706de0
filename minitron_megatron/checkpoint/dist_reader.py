"""Reads Megatron's `torch_dist` checkpoints tensor by tensor, without building a model.

On disk every parameter is one global tensor in chunks, whatever layout wrote it. A read may take any positions of it,
and reads only the chunks with these, block by block. So memory is bounded by the size of the result.
"""

import argparse
import io
import logging
from pathlib import Path

import numpy as np
import torch

from minitron_megatron.artifacts.manifest import HUGGINGFACE, MANIFEST, Manifest
from minitron_megatron.checkpoint.companions import MASK, SCALE, companions, is_companion
from minitron_megatron.checkpoint.dcp_chunks import StoredObject
from minitron_megatron.checkpoint.dcp_index import StoredTensor, is_whole, read_index
from minitron_megatron.checkpoint.hf_assets import num_tokens, read_config
from minitron_megatron.checkpoint.megatron_bridge import RUN_CONFIG, args_of_bridge
from minitron_megatron.checkpoint.recognise import hub_hint, is_gguf
from minitron_megatron.checkpoint.row_io import bits
from minitron_megatron.checkpoint.safe_load import load_plain
from minitron_megatron.checkpoint.saved_args import read_args
from minitron_megatron.errors import CheckpointError, UnsupportedModelError, UserError
from minitron_megatron.files import read_json
from minitron_megatron.model.axes import Param
from minitron_megatron.model.layers import CACHE_SCALE
from minitron_megatron.model.megatron_args import network_of_args
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import PROJECTIONS, layer_key, parameters, stacked_key

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
# Where Megatron-LM (--save-tokenizer-assets) and Megatron-Bridge save the tokenizer, in the folder of an iteration.
_TOKENIZER = "tokenizer"
# Where a user may describe a network, and its name in earlier versions.
NETWORK, _FORMER_NETWORK = "network.json", "shape.json"
# HybridModel's and GPTModel's names of the final norm.
_HYBRID_NORM, _GPT_NORM = "decoder.final_norm.", "decoder.final_layernorm."
# Megatron-LM's name, instead of an iteration, for weights that no run has trained yet.
RELEASE = "release"
# Key prefix of a teacher that is trained beside its student.
TEACHER = "teacher."
# Key prefixes of a training run's tensors that are not weights of its network.
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", f"{PROJECTIONS}.", TEACHER)
# Digits of an iteration's number.
_MAX_DIGITS = 18


def iteration_folder(iteration: int) -> str:
    """Returns Megatron's name for the folder of one iteration."""
    return f"iter_{iteration:07d}"


def checkpoint_root(path: Path) -> Path:
    """Returns the folder that holds the iterations: `path`, or its `checkpoints/` if `path` is a training run.

    Raises:
        CheckpointError: neither is a checkpoint.
    """
    for root in (path, path / "checkpoints"):
        if (root / TRACKER).is_file() or newest_whole(root):
            return root
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name the folder of a checkpoint{hub_hint(str(path))}")
    if (path.parent / TRACKER).is_file():
        raise CheckpointError(f"{path} is one iteration: name {path.parent}, whose {TRACKER} selects the iteration")
    raise CheckpointError(f"{path} is not a checkpoint: it has no {TRACKER}{_source_hint(path)}")


def _source_hint(path: Path) -> str:
    """Returns what to do with a path that is a Hugging Face folder or a GGUF file; empty if it is neither."""
    if not (path.is_file() and is_gguf(path)) and not (path / "config.json").is_file():
        return ""
    config = read_config(path) if path.is_dir() else {}
    if isinstance(config.get("quantization_config"), dict) and config["quantization_config"].get("config_groups"):
        return "; its weights are packed, so name the checkpoint that it was exported from"
    return f"; import it first, with `minitron import source={path}`"


def latest_iteration(root: Path) -> int | None:
    """Reads the latest iteration from the tracker file of a checkpoint; None for `RELEASE` weights.

    Without a tracker file, or with an empty one, it is the newest iteration that is whole.

    Raises:
        CheckpointError: it is neither a number nor `RELEASE`.
    """
    text = (root / TRACKER).read_text(errors="replace").strip(" \t\r\n\0") if (root / TRACKER).is_file() else ""
    if not text and (newest := newest_whole(root)):
        logger.warning("%s is missing or empty: reading %s", root / TRACKER, newest.name)
        text = newest.name.removeprefix("iter_")
    if text == RELEASE:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise CheckpointError(
            f"{root / TRACKER} says {text[:40]!r}: expected the number of an iteration, or {RELEASE!r}"
        )
    return int(text)


def newest_whole(root: Path) -> Path | None:
    """Returns the newest iteration below `root` that is whole, or `RELEASE`; its index is written last."""
    iterations = [path for path in root.glob("iter_*") if path.name.removeprefix("iter_").isdecimal()]
    iterations.sort(key=lambda path: int(path.name.removeprefix("iter_")))
    return next((path for path in [*reversed(iterations), root / RELEASE] if (path / ".metadata").is_file()), None)


def latest_folder(root: Path) -> Path:
    """Returns the folder that the tracker file of a checkpoint names.

    Raises:
        CheckpointError: as `latest_iteration`.
    """
    iteration = latest_iteration(root)
    return root / (RELEASE if iteration is None else iteration_folder(iteration))


def require_plain(folder: Path) -> None:
    """Validates the objects of an iteration before Megatron-Core unpickles them: complete, and only plain values.

    Args:
        folder: of the iteration.

    Raises:
        CheckpointError: its index, `common.pt`, or another object beside its tensors is damaged, or holds more than
            plain values.
    """
    _, objects = read_index(folder)
    common = folder / "common.pt"
    if common.is_file():
        objects["its values"] = StoredObject(common, 0, common.stat().st_size)
    for key, stored in objects.items():
        try:
            load_plain(io.BytesIO(stored.read()))
        except Exception as e:  # damaged files raise exceptions of many types
            place = f"{stored.path} is damaged at byte {stored.position}"
            raise CheckpointError(f"{place}, where {key} is kept: {e}") from e


class Checkpoint:
    """A `torch_dist` checkpoint on disk, as a source of weights, with companions by key where it has any.

    Opening reads only the index, and checks that every file it names exists and is long enough. Layers may be stacked
    in one tensor or each in its own, numbered as GPTModel's or as HybridModel's, where every sublayer is a layer.

    Args:
        path: the folder with `latest_checkpointed_iteration.txt`, or a training run's folder.

    Raises:
        CheckpointError: it is not a checkpoint, not complete, or does not match its network.
    """

    def __init__(self, path: Path | str):
        self.root = checkpoint_root(Path(path))
        self.iteration = latest_iteration(self.root) or 0
        self.folder = latest_folder(self.root)
        if any(self.folder.glob("mp_rank_*")):
            raise CheckpointError(
                f"{self.folder} is in Megatron-LM's old format, a file per rank: save it with --ckpt-format torch_dist"
            )
        if not (self.folder / "metadata.json").is_file():
            raise CheckpointError(f"{self.folder} is not whole: it has no metadata.json, which is written last")
        self.tensors, self._objects = read_index(self.folder)
        self.network = self._read_network()
        self._table = parameters(self.network)
        self.stacked = any(stacked_key(param) in self.tensors for param in self._table if param.layer is not None)
        self._is_hybrid = any(key.startswith(_HYBRID_NORM) for key in self.tensors)
        self.companions = companions(self.network, {key: tensor.shape for key, tensor in self.tensors.items()})
        self._check_tensors()
        self.dtype = self.tensors[self._key(self._table[0])].dtype

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.root)

    @property
    def huggingface_folder(self) -> Path:
        """The checkpoint's folder with tokenizer and Hugging Face config, or else the tokenizer that its run saved."""
        own, of_run = self.root / HUGGINGFACE, self.folder / _TOKENIZER
        return of_run if of_run.is_dir() and not own.is_dir() else own

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """The tensors of the network, without optimiser state and the like."""
        return {key: tensor for key, tensor in self.tensors.items() if not key.startswith(_NOT_WEIGHTS)}

    @property
    def masks(self) -> list[Param]:
        """The masks that it carries; see `companions`."""
        return [param for key, param in self.companions.items() if key.endswith(MASK)]

    @property
    def scales(self) -> list[Param]:
        """The scales of rounded matrices that it carries; see `companions`."""
        return [param for key, param in self.companions.items() if key.endswith(f".weight{SCALE}")]

    @property
    def cache_scales(self) -> list[Param]:
        """The scales of what generation caches that it carries; see `companions`."""
        return [param for key, param in self.companions.items() if key.endswith(CACHE_SCALE)]

    def megatron_args(self) -> argparse.Namespace | None:
        """Returns the `args` that Megatron-LM saved beside the weights; see `read_args`."""
        return read_args(self.folder, self._objects)

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`."""
        stored = self.tensors[self._key(param)]
        if param.layer is not None and self.stacked and not is_companion(param.name):
            return self._gather(stored, [np.array([param.layer]), *index])[0]
        return self._gather(stored, index)

    def _key(self, param: Param) -> str:
        """Returns the key of a parameter on disk."""
        if is_companion(param.name):
            return layer_key(param)
        if self.stacked:
            return stacked_key(param)
        if not self._is_hybrid:
            return layer_key(param)
        if param.position is None:
            return param.name.replace(_GPT_NORM, _HYBRID_NORM)
        return f"decoder.layers.{param.position}.{param.name}"

    def _gather(self, stored: StoredTensor, index: list[np.ndarray]) -> torch.Tensor:
        """Reads the positions `index[0] x index[1] x ...` of a global tensor, chunk by chunk."""
        out = torch.empty([len(i) for i in index], dtype=stored.dtype)
        for chunk in stored.chunks:
            # Positions are ascending, so those within a chunk are a slice of `index`.
            inside = [
                slice(*np.searchsorted(positions, [start, start + size]))
                for positions, start, size in zip(index, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(s.start < s.stop for s in inside):
                wanted = [p[s] - start for p, s, start in zip(index, inside, chunk.offsets, strict=True)]
                chunk.read(wanted, bits(out)[tuple(inside)])
        return out

    def _read_network(self) -> Network:
        """Reads the network from the manifest or the user's description, or else from the args of a Megatron-LM run."""
        names = (MANIFEST, NETWORK, _FORMER_NETWORK)
        file = next((self.root / name for name in names if (self.root / name).exists()), None)
        if file is None:
            return self._network_of_args()
        values = read_json(file, "the description of a network")
        try:
            described = Manifest.from_dict(values).network if file.name == MANIFEST else values
            if described is None:
                raise ValueError("its network is null")
            return Network.from_dict(described)
        except (TypeError, ValueError, KeyError) as e:
            raise CheckpointError(f"{file} does not describe a network: {e}") from e

    def _network_of_args(self) -> Network:
        describe = f"describe the network in {self.root / NETWORK} (as a manifest's `network` does)"
        args = self.megatron_args() or args_of_bridge(self.folder)
        if args is None:
            raise CheckpointError(
                f"{self.root} does not say what its network is: it has neither {MANIFEST} nor args of Megatron-LM nor "
                f"{RUN_CONFIG} of Megatron-Bridge; {describe}"
            )
        try:
            network = network_of_args(args)
        except UserError as e:
            raise UnsupportedModelError(f"{self.folder}: {e}\nif the args are wrong, {describe}") from e
        # The args' vocabulary size is right even if the tokenizer has fewer tokens than the model has rows.
        if getattr(args, "vocab_size", None) and not (self.huggingface_folder / "config.json").is_file():
            return network
        known = num_tokens(self.huggingface_folder, network.padded_vocab_size)
        return network.replace(vocab_size=known) if known else network

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for param in self._table:
            layers = (len(self.network.layers),) if self.stacked and param.layer is not None else ()
            expected[self._key(param)] = (*layers, *param.shape)
        expected |= {key: param.shape for key, param in self.companions.items()}
        problems = []
        for key, size in expected.items():
            if key not in self.tensors:
                problems.append(f"missing: {key} {list(size)}")
            elif self.tensors[key].shape != size:
                problems.append(f"wrong size: {key} is {list(self.tensors[key].shape)}, the network has {list(size)}")
            elif not is_whole(self.tensors[key]):
                problems.append(f"not whole: {key} {list(size)}, of which some chunks are missing")
        unknown = [key for key in self.weights if key not in expected]
        problems += [f"unknown: {key} {list(self.tensors[key].shape)}" for key in unknown]
        if problems:
            raise CheckpointError(f"{self.folder} does not hold its network:\n  " + "\n  ".join(problems))
