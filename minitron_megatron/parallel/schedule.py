"""Runs a model forward through Megatron-Core's pipeline schedules."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from minitron_megatron.parallel.context import ParallelContext

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

Batch = dict[str, Tensor]
T = TypeVar("T")

SAMPLE_IDS = "sample_ids"
"""Key of the index of each row's sample, int64 `[batch]` on the CPU, in a micro-batch."""

PADDING = -1
"""Sample id of a padding row, of which no token counts."""


def to_device(batches: Iterable[Batch], device: torch.device) -> list[Batch]:
    """Copies micro-batches to a device. Sample ids stay on the CPU, where they are looked up."""
    return [
        {key: value if key == SAMPLE_IDS else value.to(device, non_blocking=True) for key, value in batch.items()}
        for batch in batches
    ]


def run_forward(
    model_chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    ctx: ParallelContext,
    on_output: Callable[[Tensor, Batch], T],
    before: Callable[[Batch], None] | None = None,
    within: Callable[[], AbstractContextManager] = nullcontext,
) -> list[T]:
    """Runs micro-batches forward through all pipeline stages, without gradients.

    Args:
        model_chunks: this rank's model, one per virtual pipeline stage.
        batches: micro-batches of `tokens`, `position_ids`, ... `[batch, seq]`, all of one size, see
            `group_microbatches`.
        ctx: this rank's place.
        on_output: called on the last stage with the output `[seq(/tp), batch, hidden]` and its batch.
        before: called on every stage before a model chunk runs a batch.
        within: makes the context that a model chunk runs in.

    Returns:
        what `on_output` returned, in the order of the batches; empty on all but the last stage.
    """

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor, bool], T]]:
        batch = next(iterator)
        if before is not None:
            before(batch)
        with within():
            output = forward_hidden(model, batch)

        def collect(output: Tensor, non_loss_data: bool = True) -> T:
            return on_output(output, batch)

        return output, collect

    for chunk in model_chunks:
        if chunk.training:  # eval() visits all modules, too slow for every new token
            chunk.eval()
    with torch.no_grad():
        size = batches[0]["tokens"].shape
        return run_schedule(forward_step, model_chunks, batches, size, forward_only=True, collect_non_loss_data=True)


def forward_hidden(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Runs a forward pass that ends at the last hidden state, before the output projection.

    Losses project it themselves, a block of tokens at a time, so that full-vocabulary logits never exist.

    Args:
        model: any GPTModel or HybridModel, or Megatron's wrapper around one for training.
        batch: with `tokens` and `position_ids` `[batch, seq]`, and with `document_ids` where attention stays within
            documents, which needs a model of `build_model`.

    Returns:
        `[seq(/tp), batch, hidden]`, in the output weight's dtype, where Megatron's Float16Module would return float32;
        on all but the last stage the tensor for the next one.
    """
    network = unwrap_model(model)
    post_process, network.post_process = network.post_process, False
    try:
        output = model(batch["tokens"], batch["position_ids"], attention_mask=batch.get("document_ids"))
    finally:
        network.post_process = post_process
    return output.to(output_weight(network).dtype) if post_process else output


def output_weight(model: "GPTModel") -> Tensor:
    """Returns the output projection's weight of a GPTModel or HybridModel, `[vocab/tp, hidden]`, on the last stage."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def own_tokens(loss_mask: Tensor, ctx: ParallelContext) -> Tensor:
    """Returns this rank's part of a mask `[batch, seq]`, as `[seq(/tp), batch]`."""
    mask = loss_mask.transpose(0, 1)
    return mask.chunk(ctx.layout.tensor, dim=0)[ctx.tensor_rank] if ctx.layout.sequence else mask


def group_microbatches(batches: Iterable[Batch], ctx: ParallelContext) -> Iterator[list[Batch]]:
    """Groups micro-batches into calls of a schedule: as many at a time as keep the pipeline stages busy.

    The interleaved schedule needs a multiple of the pipeline size, so the last call is padded with batches of which no
    token counts.
    """
    layout = ctx.layout
    per_call = 1 if layout.pipeline == 1 else 4 * layout.pipeline
    batches = iter(batches)
    while call := list(islice(batches, per_call)):
        if layout.model_chunks > 1:
            call += [_padding_like(call[-1])] * (-len(call) % layout.pipeline)
        yield call


def _padding_like(batch: Batch) -> Batch:
    """Returns a micro-batch of the same size whose rows are all padding."""
    padding = {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}
    if SAMPLE_IDS in batch:
        padding[SAMPLE_IDS] = torch.full_like(batch[SAMPLE_IDS], PADDING)
    return padding


def run_schedule(
    forward_step: Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, Callable[..., Any]]],
    model_chunks: Sequence[torch.nn.Module],
    items: Sequence[Any],
    size: torch.Size,
    **options: Any,
) -> list[Any]:
    """Runs Megatron-Core's schedule for this layout.

    Args:
        forward_step: see Megatron-Core's `get_forward_backward_func`.
        model_chunks: this rank's model, one per virtual pipeline stage.
        items: the data that `forward_step` takes from its iterator, one item per micro-batch.
        size: `[batch, seq]` of every micro-batch.
        options: of the schedule.
    """
    batch_size, sequence_length = size
    interleaved = len(model_chunks) > 1
    iterators = [iter(items) for _ in model_chunks]
    schedule = get_forward_backward_func()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(model_chunks) if interleaved else model_chunks[0],
        num_microbatches=len(items),
        seq_length=sequence_length,
        micro_batch_size=batch_size,
        **options,
    )
