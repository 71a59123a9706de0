"""The verb `score`: a checkpoint and text become importance scores."""

import logging
from pathlib import Path

from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.manifest import Manifest, Parent, is_done, writing
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.config.compose import to_plain
from minitron_megatron.config.schema import Aggregation, ScoreConfig
from minitron_megatron.data.samples import Samples, rank_batches, training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import UnsupportedModelError, raise_if_any
from minitron_megatron.model.build import Backbone, build_model
from minitron_megatron.model.shape import ModelShape, layout_problems
from minitron_megatron.parallel.collectives import main_first
from minitron_megatron.parallel.groups import Groups, process_groups
from minitron_megatron.parallel.schedule import in_calls, run_forward
from minitron_megatron.progress import progress
from minitron_megatron.pruning.capture import Capture
from minitron_megatron.pruning.scores import Scores

logger = logging.getLogger(__name__)


def score(config: ScoreConfig) -> Path:
    """Score every hidden channel, neuron, head and layer of a checkpoint on a calibration set.

    Returns:
        the folder with `scores.safetensors`.

    Raises:
        CheckpointError: the checkpoint is not whole.
        DataError: the text is shorter than one sequence.
        ConfigError: the layout does not fit the network or the world.
        UnsupportedModelError: the network has no layers of an attention and an MLP each.
    """
    checkpoint, output = Checkpoint(config.checkpoint), Path(config.output)
    raise_if_any(layout_problems(checkpoint.shape, config.parallel, "checkpoint"))
    if not checkpoint.shape.is_uniform:
        raise UnsupportedModelError(
            f"checkpoint = {config.checkpoint} has shape.pattern = {checkpoint.shape.pattern!r}, and only '*-' "
            f"repeated is scored: score the network that it comes from"
        )
    manifest = Manifest(
        "scores", checkpoint.shape.to_dict(), [Parent.of("checkpoint", checkpoint.root)], to_plain(config)
    )
    if is_done(output, manifest):
        return output
    with process_groups(config.parallel) as groups:
        corpus = main_first(lambda: prepare_corpus(config.data, checkpoint.huggingface_folder))
        samples = training_samples(corpus, config.data, config.num_samples)
        chunks = build_model(checkpoint.shape, groups, config.dtype)
        load_weights(chunks, checkpoint, groups)
        scores = score_model(
            chunks,
            checkpoint.shape,
            groups,
            samples,
            config.num_samples,
            config.micro_batch,
            config.sequence_aggregation,
            config.batch_aggregation,
        )
        if groups.is_main:
            scores.settings = {
                "sequence_aggregation": config.sequence_aggregation.value,
                "batch_aggregation": config.batch_aggregation.value,
                "num_samples": config.num_samples,
                "sequence_length": config.data.sequence_length,
                "corpus": corpus.fingerprint,
            }
            with writing(output, manifest) as folder:
                scores.write(folder)
    return output


def score_model(
    chunks: list[Backbone],
    shape: ModelShape,
    groups: Groups,
    samples: Samples,
    num_samples: int,
    micro_batch: int,
    sequence_aggregation: Aggregation = Aggregation.MEAN,
    batch_aggregation: Aggregation = Aggregation.L2,
) -> Scores:
    """Score a model that is there already, on this rank's share of `samples`.

    Args:
        chunks: this rank's model.
        shape: of the whole network.
        groups: this rank's place.
        samples: the calibration set; every sequence is read once over all data-parallel ranks.
        num_samples: how many of them.
        micro_batch: sequences per forward pass.

    Returns:
        the same scores on every rank, for any layout.
    """
    batches = rank_batches(samples, 0, num_samples, micro_batch, groups.data_rank, groups.layout.data)
    total = -(-num_samples // (micro_batch * groups.layout.data))
    with Capture(chunks, shape, groups, sequence_aggregation) as capture, progress("score", total) as advance:
        for call in in_calls(batches, groups):
            for batch in call:
                capture.count(batch["loss_mask"])
            run_forward(
                chunks,
                call,
                groups,
                on_output=lambda output, batch: None,
                before=lambda batch: capture.set_mask(batch["loss_mask"]),
            )
            advance(len(call))
        return capture.scores(batch_aggregation)
