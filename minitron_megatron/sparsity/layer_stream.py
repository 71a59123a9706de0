"""Runs a network over a calibration set one layer at a time.

Only one layer and the hidden states of the calibration set at one boundary are in memory, so networks are worked on
that are many times as large as a device. Every rank has whole layers and its own share of the samples.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from minitron_megatron.checkpoint.companions import matrices
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.config.common import DType
from minitron_megatron.model.axes import Param
from minitron_megatron.model.build import TORCH_DTYPES, build_bare_layer, held_sublayers
from minitron_megatron.model.layers import Sublayer
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import cache_scales, parameters
from minitron_megatron.model.torch_modules import normalize
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import PADDING, SAMPLE_IDS, Batch


class OneLayer:
    """A transformer layer of a source, as the source of a network that has no other."""

    def __init__(self, source: TensorSource, number: int):
        self.source = source
        self.positions = source.network.layers[number]
        self.network = source.network.replace(
            sublayers=tuple(source.network.sublayers[position] for position in self.positions)
        )
        self.dtype = source.dtype
        self._origins = {(param.position, param.name): param for param in parameters(source.network)}

    def origin(self, param: Param) -> Param:
        """Returns the parameter of the whole network."""
        assert param.position is not None
        return self._origins[self.positions[param.position], param.name]

    def read(self, param: Param, index: list[np.ndarray]) -> Tensor:
        """See `TensorSource.read`."""
        return self.source.read(self.origin(param), index)


class LayerStream:
    """The hidden states of a calibration set between two layers, and the layer after them.

    Args:
        source: of the weights.
        batches: this rank's micro-batches.
        ctx: this rank's place, without tensor or pipeline parallelism.
        dtype: of weights and computation.
        file: where hidden states are kept; None for in memory.
    """

    def __init__(
        self,
        source: TensorSource,
        batches: Sequence[Batch],
        ctx: ParallelContext,
        dtype: DType,
        file: Path | None = None,
    ):
        self.source = source
        self.batches = batches
        self.ctx = ctx
        self.dtype = dtype
        self._built: tuple[tuple[Sublayer, ...], torch.nn.Module] | None = None
        self.states = self._embed(file)

    def load(self, number: int) -> torch.nn.Module:
        """Returns a layer with its weights, as a model. The one before it is overwritten."""
        layer = OneLayer(self.source, number)
        sublayers = layer.network.sublayers
        if self._built is None or self._built[0] != sublayers:
            self._built = None  # before the next one is built
            model = build_bare_layer(layer.network, self.ctx, self.dtype)
            model.requires_grad_(False)
            self._built = sublayers, model.eval()
        model = self._built[1]
        for weight in model.parameters():
            weight.untyped_storage().resize_(weight.nbytes)
        load_weights([model], layer, self.ctx)
        return model

    def unload(self) -> None:
        """Frees the weights of the loaded layer."""
        if self._built is not None:
            for weight in self._built[1].parameters():
                weight.untyped_storage().resize_(0)

    def run(self, model: torch.nn.Module, advance: bool, after_batch: Callable[[], None] = lambda: None) -> None:
        """Runs a layer over all micro-batches.

        Args:
            model: of `load`.
            advance: whether its output becomes the hidden states.
            after_batch: called after every micro-batch.
        """
        for number, output in enumerate(self.outputs(model, self.states)):
            if advance:
                self.states[number].copy_(output)
            after_batch()

    @torch.no_grad()
    def outputs(self, model: torch.nn.Module, states: Tensor) -> Iterator[Tensor]:
        """Yields a layer's outputs `[seq, batch, hidden]` for every micro-batch.

        Args:
            model: of `load`.
            states: hidden states before the layer, `[batches, seq, batch, hidden]`.
        """
        own = unwrap_model(model)
        for batch, before in zip(self.batches, states, strict=True):
            own.set_input_tensor(before.to(self.ctx.device, non_blocking=True))
            yield model(
                batch["tokens"].to(self.ctx.device),
                batch["position_ids"].to(self.ctx.device),
                attention_mask=None if "document_ids" not in batch else batch["document_ids"].to(self.ctx.device),
            )

    def weights(self, model: torch.nn.Module, number: int) -> dict[str, Tensor]:
        """Returns the weights of a layer's matrices by name, to be changed in place until another one is loaded."""
        network = OneLayer(self.source, number).network
        layers = self._held(model, network)
        return {param.name: layers[param.position].get_parameter(param.name).data for param in matrices(network)}

    @contextmanager
    def inputs(self, model: torch.nn.Module, network: Network, take: Callable[[Param, Tensor], None]) -> Iterator[None]:
        """Passes on the inputs of a layer's matrices while the block runs it.

        Args:
            model: of `load`.
            network: of one layer, see `OneLayer`.
            take: called with each matrix and its inputs `[tokens, columns]`, without those of padding rows.
        """
        layers = self._held(model, network)
        handles, number = [], 0

        def watch(param: Param, module: torch.nn.Module) -> None:
            def hook(module: Any, args: tuple[Tensor, ...]) -> None:
                x = args[0]
                if hasattr(module, "layer_norm_weight"):  # Transformer Engine fuses the norm into it
                    x = normalize(x, module.layer_norm_weight, module.layer_norm_bias, module.config)
                is_row = self.batches[number][SAMPLE_IDS] != PADDING
                take(param, (x if is_row.all() else x[:, is_row.to(x.device)]).flatten(0, 1))

            handles.append(module.register_forward_pre_hook(hook))

        def count(module: torch.nn.Module, args: object, output: object) -> None:
            nonlocal number
            number += 1

        for param in matrices(network):
            watch(param, layers[param.position].get_submodule(param.name.removesuffix(".weight")))
        handles.append(model.register_forward_hook(count))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def cached(self, model: torch.nn.Module, network: Network, take: Callable[[Param, Tensor], None]) -> Iterator[None]:
        """Passes on what a layer would cache in generation while the block runs it.

        Args:
            model: of `load`.
            network: of one layer, see `OneLayer`.
            take: called with the scale of each cached tensor, of `cache_scales(network)`, and the tensor
                `[seq, batch, ...]`, with padding rows, which repeat a sample.
        """
        layers = self._held(model, network)
        tensors = [own for sublayer in network.sublayers for own in sublayer.cached]

        def hook(scale: Param, argument: int, module: Any, args: tuple[Tensor, ...]) -> None:
            take(scale, args[argument])

        with ExitStack() as stack:
            for scale, tensor in zip(cache_scales(network), tensors, strict=True):
                module = layers[scale.position].get_submodule(tensor.module)
                stack.callback(module.register_forward_pre_hook(partial(hook, scale, tensor.argument)).remove)
            yield

    def _held(self, model: torch.nn.Module, network: Network) -> dict[int | None, torch.nn.Module]:
        """Returns the module of a network of one layer that each of its sublayers lies in, by position."""
        return {position: layer for positions, layer in held_sublayers(model, network) for position in positions}

    def _embed(self, file: Path | None) -> Tensor:
        """Returns the embeddings of all micro-batches, `[batches, seq, batch, hidden]`. Reads no other row."""
        tokens = torch.stack([batch["tokens"] for batch in self.batches])
        embedding = next(param for param in parameters(self.source.network) if param.is_embedding)
        rows, places = np.unique(tokens.numpy(), return_inverse=True)
        hidden = self.source.network.hidden_size
        table = self.source.read(embedding, [rows, np.arange(hidden)]).to(TORCH_DTYPES[self.dtype])
        shape, dtype = (len(tokens), tokens.shape[2], tokens.shape[1], hidden), table.dtype
        if file is None:
            states = torch.empty(shape, dtype=dtype)
        else:
            size = int(np.prod(shape))
            states = torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
        for number, place in enumerate(torch.from_numpy(places).view(tokens.shape)):
            states[number] = table[place].transpose(0, 1)
        return states
