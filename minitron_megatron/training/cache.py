"""The verb `cache`: runs a teacher once over the samples of a run, and keeps its predictions."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.utils import unwrap_model
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.artifacts.fingerprint import fingerprint
from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.artifacts.manifest import CACHE, HUGGINGFACE, Manifest, Parent
from minitron_megatron.artifacts.output import begin_parts, is_done, writing
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.hf_assets import copy_hf_assets
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.cache import CacheConfig, CacheForm
from minitron_megatron.config.compose import to_plain
from minitron_megatron.data.corpus import text_parents
from minitron_megatron.data.samples import (
    FIRST_HELDOUT,
    Samples,
    heldout_samples,
    rank_batches,
    require_tokens,
    training_samples,
)
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.distillation.linear_losses import Predictions, Projection
from minitron_megatron.distillation.live_teacher import LiveTeacher
from minitron_megatron.distillation.prediction_cache import (
    HELDOUT,
    OUTPUT,
    TRAIN,
    CacheIndex,
    Split,
    pack,
    shard_path,
    write_shard,
)
from minitron_megatron.distillation.sparse_predictions import count_draws, draw, most_likely
from minitron_megatron.distillation.teachers import Wanted
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.files import link_or_copy, replacing
from minitron_megatron.model.build import TORCH_DTYPES, build_model, build_problems
from minitron_megatron.model.positions import warn_of_positions
from minitron_megatron.parallel.collectives import gather_dim, raise_on_all_ranks, rank0_first
from minitron_megatron.parallel.context import ParallelContext, parallel_context
from minitron_megatron.parallel.cpu import bypass_cpu_mode
from minitron_megatron.parallel.schedule import (
    PADDING,
    SAMPLE_IDS,
    Batch,
    group_microbatches,
    output_weight,
    to_device,
)
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.progress import progress
from minitron_megatron.training.loop import better_than_chance

logger = logging.getLogger(__name__)


@sole_writer
def cache(config: CacheConfig) -> Path:
    """Writes a teacher's predictions for the samples of a run; see `distillation.prediction_cache`.

    An interrupted run goes on after its last whole shard when it is started again with the same settings. Which tokens
    are drawn depends on the sample and the seed, and not on how samples are spread over ranks.

    Returns:
        folder of the cache.

    Raises:
        CheckpointError: the teacher is not whole.
        ConfigError: the layout does not fit the teacher, or the output holds something else.
        DataError: the text is too short or has no token that counts, or the teacher is not better than chance on it.
    """
    teacher, output = Checkpoint(config.teacher), Path(config.output)
    problems = build_problems(teacher.network, config.parallel, "teacher")
    vocab = teacher.network.vocab_size
    if config.form is CacheForm.TOP_K and config.top_k >= vocab:
        problems.append(f"top_k = {config.top_k}, and the vocabulary has {vocab} tokens: keep fewer")
    raise_if_any(problems)
    warn_of_positions(teacher.network.max_positions, config.data.sequence_length, "the teacher")
    parents = [Parent.of("teacher", teacher.root), *text_parents(config.data.text)]
    manifest = Manifest(CACHE, teacher.network.to_dict(), parents, to_plain(config), verb="cache")
    if is_done(output, manifest):
        return output
    with parallel_context(config.parallel) as ctx:
        corpus = rank0_first(lambda: prepare_corpus(config.data, teacher.huggingface_folder))
        train = training_samples(corpus, config.data, config.num_samples)
        require_tokens(train, "training", config.num_samples)
        sources: dict[str, Samples] = {TRAIN: train}
        splits = {TRAIN: Split(train.fingerprint, config.num_samples)}
        if config.heldout_samples:
            heldout = heldout_samples(corpus, config.data)
            sources[HELDOUT] = heldout
            splits[HELDOUT] = Split(heldout.fingerprint, min(config.heldout_samples, len(heldout)))
        index = _index(config, vocab, splits)
        work = output.with_name(f".{output.name}.shards")
        rank0_first(lambda: begin_parts(work, manifest))
        _Writer(config, index, teacher, sources, work, ctx).write()
        rank0_first(lambda: _finish(work, output, manifest, index, teacher))
    return output


def _index(config: CacheConfig, vocab: int, splits: dict[str, Split]) -> CacheIndex:
    most = {CacheForm.SAMPLED: config.draws, CacheForm.TOP_K: config.top_k, CacheForm.HIDDEN: 0}[config.form]
    length = config.data.sequence_length
    return CacheIndex(config.form, vocab, length, config.shard_samples, config.temperature, most, splits)


def _finish(work: Path, output: Path, manifest: Manifest, index: CacheIndex, teacher: Checkpoint) -> None:
    """Makes the cache of its files."""
    files = index.files(work)
    if missing := [str(file) for file in files if not file.is_file()]:
        raise CheckpointError(f"{missing[0]} is missing: the folder must be on a file system that all ranks share")
    with writing(output, manifest) as folder:
        for file in files:
            link_or_copy(file, folder / file.name)
        copy_hf_assets(teacher.huggingface_folder, folder / HUGGINGFACE)
        index.write(folder)
        manifest.details["files"] = {file.name: fingerprint(folder / file.name) for file in files}
    shutil.rmtree(work)
    logger.info(
        "%s: %s predictions for %s samples of %d tokens, %.1f bytes a token",
        output,
        index.form.value,
        " and ".join(f"{split.num_samples} {name}" for name, split in index.splits.items()),
        index.sequence_length,
        index.bytes_per_token(output),
    )


@dataclass(frozen=True)
class _Writer:
    """Writes the shards that are not there yet.

    Attributes:
        config: settings of the verb.
        index: of the cache.
        teacher: checkpoint of the teacher.
        sources: samples by split.
        work: folder of the shards.
        ctx: this rank's place.
    """

    config: CacheConfig
    index: CacheIndex
    teacher: Checkpoint
    sources: dict[str, Samples]
    work: Path
    ctx: ParallelContext

    def write(self) -> None:
        """Writes them, a shard for each replica at a time, and for hidden states the output weight. Collective."""
        ctx, config = self.ctx, self.config
        dtype = config.dtype or next(own for own, torchs in TORCH_DTYPES.items() if torchs is self.teacher.dtype)
        model_chunks = build_model(self.teacher.network, ctx, dtype)
        load_weights(model_chunks, self.teacher, ctx)
        for chunk in model_chunks:
            chunk.requires_grad_(False)
        name = f"teacher = {config.teacher}"
        teacher = LiveTeacher(model_chunks, ctx, self.index.vocab, config.chunk_tokens, name)
        teacher.prepare(Wanted(predictions=True))
        self._check(teacher)
        names = [(split, number) for split in self.index.splits for number in range(len(self.index.shards(split)))]
        left = rank0_first(lambda: [own for own in names if not shard_path(self.work, *own).exists()])
        if len(left) < len(names):
            logger.info("going on after %d of %d shards", len(names) - len(left), len(names))
        replicas = ctx.layout.replicas
        with watchdog(ctx.timeout_min) as heartbeat, progress("cache", len(names)) as advance:
            advance(len(names) - len(left))
            for first in range(0, len(left), replicas):
                with raise_on_all_ranks():
                    for split, number in left[first + ctx.data_rank :][:1]:
                        self._write_shard(teacher, split, number, heartbeat)
                advance(min(replicas, len(left) - first))
        if config.form is CacheForm.HIDDEN:
            with raise_on_all_ranks():
                self._write_weight(model_chunks[-1])

    def _check(self, teacher: LiveTeacher) -> None:
        """Measures the teacher on the first batch.

        Raises:
            DataError: it is not better than chance.
        """
        ctx, size, replicas = self.ctx, self.config.micro_batch, self.ctx.layout.replicas
        batches = rank_batches(self.sources[TRAIN], 0, size * replicas, size, ctx.data_rank, replicas)
        result = teacher.evaluate(next(group_microbatches(to_device(batches, ctx.device), ctx)))
        if result.num_tokens:
            better_than_chance(result, teacher.name, self.index.vocab)

    def _write_shard(self, teacher: LiveTeacher, split: str, number: int, heartbeat: Callable[[], None]) -> None:
        """Writes a shard. Collective for a replica."""
        samples = self.index.shards(split)[number]
        first_id = FIRST_HELDOUT if split == HELDOUT else 0
        batches = rank_batches(
            self.sources[split], samples.start, len(samples), self.config.micro_batch, 0, 1, first_id
        )
        rows: list[dict[str, Tensor]] = []
        for group in group_microbatches(batches, self.ctx):
            call = to_device(group, self.ctx.device)
            with teacher.teach(call, training=False) as targets, torch.no_grad():
                if self.ctx.is_last_stage:
                    for place, batch in enumerate(call):
                        rows += self._rows(targets.predictions(place), batch)
            heartbeat()
        if self.ctx.is_last_stage and self.ctx.tensor_rank == 0:
            write_shard(shard_path(self.work, split, number), rows)

    def _rows(self, predictions: Predictions, batch: Batch) -> list[dict[str, Tensor]]:
        """Returns what is kept of each sample of a micro-batch, on the first tensor rank. Collective for all.

        Args:
            predictions: of whole sequences, `[sequence x batch, hidden]`.
            batch: the samples.
        """
        kept, places = self._kept(predictions, batch), range(len(batch["tokens"]))
        if self.ctx.tensor_rank:
            return []  # the first one writes
        by_row = {key: value.unflatten(0, (self.index.sequence_length, -1)).cpu() for key, value in kept.items()}
        is_row = batch[SAMPLE_IDS] != PADDING
        rows = [{key: value[:, place] for key, value in by_row.items()} for place in places if is_row[place]]
        return [pack(row, self.index) for row in rows]

    def _kept(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """Returns what is kept of a micro-batch, each `[sequence x batch, ...]`."""
        config, group = self.config, self.ctx.collection.tp
        hidden, weight = predictions
        if config.form is CacheForm.HIDDEN:
            return {"hidden": hidden}
        first_row = group.rank() * weight.size(0)
        project = Projection(
            predictions, config.chunk_tokens, min(max(self.index.vocab - first_row, 0), weight.size(0))
        )
        uniforms = self._uniforms(batch) if config.form is CacheForm.SAMPLED else None
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(hidden), config.chunk_tokens):
            tokens = slice(start, start + config.chunk_tokens)
            logits = project(tokens).float() / config.temperature
            with bypass_cpu_mode():
                if uniforms is None:
                    parts.append(most_likely(logits, config.top_k, first_row, group)._asdict())
                else:
                    ids, entropy = draw(logits, uniforms[tokens], first_row, group)
                    parts.append({"ids": ids, "entropy": entropy})
        kept = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        if uniforms is not None:
            kept["ids"], counts = count_draws(kept["ids"])
            kept["counts"] = counts * batch["loss_mask"].transpose(0, 1).flatten()[:, None].bool()
        return kept

    def _uniforms(self, batch: Batch) -> Tensor:
        """Returns float64 `[sequence x batch, draws]` in [0, 1), one in each of `draws` equal parts of it.

        Draws are spread more evenly so than independent ones, and are as often right on average. They depend on the
        sample and the seed alone.
        """
        shape = self.index.sequence_length, self.config.draws
        ids = [max(0, sample) for sample in batch[SAMPLE_IDS].tolist()]
        rows = [torch.from_numpy(np.random.default_rng([self.config.seed, own]).random(shape)) for own in ids]
        within = torch.stack(rows, dim=1).flatten(0, 1)
        return ((torch.arange(self.config.draws) + within) / self.config.draws).to(self.ctx.device)

    def _write_weight(self, model: torch.nn.Module) -> None:
        """Writes the whole output weight, for a cache of hidden states."""
        if not self.ctx.is_last_stage or self.ctx.data_rank:
            return
        weight = gather_dim(output_weight(unwrap_model(model)), self.ctx.collection.tp, dim=0)[: self.index.vocab]
        if self.ctx.tensor_rank == 0:
            with replacing(self.work / OUTPUT) as temporary:
                save_file({"weight": weight.cpu().contiguous()}, temporary)
