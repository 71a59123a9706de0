"""The verb `score`: a checkpoint and text become importance scores."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.manifest import Manifest, Parent, is_done, writing
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.config.compose import to_plain
from minitron_megatron.config.schema import ScoreConfig, Unit
from minitron_megatron.data.choices import ChoiceSamples, read_questions
from minitron_megatron.data.encoding import load_tokenizer
from minitron_megatron.data.samples import training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import UnsupportedModelError, raise_if_any
from minitron_megatron.model.build import build_model, build_problems
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.shape import ATTENTION, MLP, layout_problems
from minitron_megatron.parallel.collectives import main_first
from minitron_megatron.parallel.groups import Groups, process_groups
from minitron_megatron.pruning.calibration import Search, score_model
from minitron_megatron.pruning.partial import PartialSums
from minitron_megatron.pruning.plan import Plan, plan_for
from minitron_megatron.pruning.scores import WIDTH, Scores
from minitron_megatron.pruning.slicing import Pruned, write_pruned
from minitron_megatron.pruning.target import resolve_target

logger = logging.getLogger(__name__)

# Tensor-parallel ranks that the sizes between two rounds are made for.
_MOST_RANKS = 64


def score(config: ScoreConfig) -> Path:
    """Score every hidden channel, neuron, head and layer of a checkpoint on a calibration set.

    An interrupted scoring goes on from its last partial sums when it is started again with the same settings.

    Returns:
        the folder with `scores.safetensors`.

    Raises:
        CheckpointError: the checkpoint is not whole.
        DataError: the text is shorter than one sequence, a question is none, or activations are not finite.
        ConfigError: the layout does not fit the network or the world, or the target cannot be reached.
        UnsupportedModelError: the network has no layers of an attention and an MLP each.
    """
    checkpoint, output = Checkpoint(config.checkpoint), Path(config.output)
    raise_if_any(layout_problems(checkpoint.shape, config.parallel, "checkpoint"))
    if not checkpoint.shape.is_uniform:
        raise UnsupportedModelError(
            f"checkpoint = {config.checkpoint} has shape.pattern = {checkpoint.shape.pattern!r}, and only '*-' "
            f"repeated is scored: score the network that it comes from"
        )
    questions = read_questions(Path(config.depth.choices)) if config.depth.choices else None
    settings, ways = to_plain(config), []
    if config.depends_on_target:
        # In numbers, so that a layout for which a fraction is rounded otherwise is not taken for the same target.
        settings["target"] = resolve_target(checkpoint.shape, config.target, config.parallel).sizes
        Search(checkpoint.shape, config)  # which says now what could not be left out later
        ways = [_part_way(config, checkpoint, number) for number in range(1, config.rounds)]
        for number, way in enumerate(ways, start=1):
            raise_if_any(build_problems(way.shape_of(checkpoint.shape), config.parallel, f"what round {number} leaves"))
    else:
        # What does not depend on the target need not be scored again for another one.
        del settings["target"]
    parents = [Parent.of("checkpoint", checkpoint.root), *Parent.of_text(config.data.text)]
    if config.depth.choices:
        parents.append(Parent.of("choices", Path(config.depth.choices)))
    manifest = Manifest("scores", checkpoint.shape.to_dict(), parents, settings, verb="score")
    if is_done(output, manifest):
        return output
    for number in range(1, config.rounds) if config.save_rounds else ():
        is_done(*_round(output, manifest, number))  # or it is something else, which is said now
    with process_groups(config.parallel) as groups:
        corpus = main_first(lambda: prepare_corpus(config.data, checkpoint.huggingface_folder))
        # More would be the same sequences again, which count no more than once.
        num_samples = min(config.num_samples, corpus.num_sequences(config.data.sequence_length))
        if num_samples < config.num_samples:
            logger.warning("num_samples = %d: the text has only %d sequences", config.num_samples, num_samples)
        config = dataclasses.replace(config, num_samples=num_samples)
        samples = training_samples(corpus, config.data, num_samples)
        choices = None
        if questions:
            tokenizer = load_tokenizer(checkpoint.huggingface_folder)
            multiple = config.parallel.tensor if config.parallel.sequence else 1
            choices = ChoiceSamples(questions, tokenizer, multiple)
        partial = PartialSums(
            groups,
            config.micro_batch,
            output.with_name(f".{output.name}.sums"),
            json.dumps([parents[0].fingerprint, corpus.fingerprint, manifest.cache_key, [way.sizes for way in ways]]),
            config.save_every,
        )
        scores = _score_in_rounds(config, checkpoint, manifest, groups, samples, choices, partial)
        scores.settings = {
            **{
                axis: f"{how.criterion.value}, {how.sequence_aggregation.value} over tokens, "
                f"{how.batch_aggregation.value} over sequences"
                for axis, how in config.axes.items()
            },
            "neurons": config.neurons.value,
            "rounds": config.rounds,
            "num_samples": config.num_samples,
            "sequence_length": config.data.sequence_length,
            "corpus": corpus.fingerprint,
        }
        if groups.is_main:
            with writing(output, manifest) as folder:
                scores.write(folder)
        partial.remove()
    return output


def _score_in_rounds(
    config: ScoreConfig, checkpoint: Checkpoint, manifest: Manifest, groups: Groups, samples, choices, partial
) -> Scores:
    """Score, prune a little on the way to the target, score what is left, and so on.

    Nothing is written between rounds: a smaller model is loaded through the plan so far.
    """
    plan, scores = None, None
    for number in range(1, config.rounds + 1):
        source = Pruned(checkpoint, plan) if plan else checkpoint
        if config.rounds > 1:
            logger.info("round %d of %d: %.1fM parameters", number, config.rounds, num_parameters(source.shape) / 1e6)
        chunks = build_model(source.shape, groups, config.dtype)
        load_weights(chunks, source, groups)
        found = score_model(chunks, source.shape, groups, samples, config, choices, partial, f"{number}.")
        found.checkpoint = None if plan else manifest.parents[0].fingerprint
        del chunks
        scores = _as_of_source(scores, found, plan, number) if config.rounds > 1 else found
        if number < config.rounds:
            step = plan_for(found, _part_way(config, checkpoint, number))
            plan = plan.then(step) if plan else step
            if config.save_rounds:
                folder, made_from = _round(Path(config.output), manifest, number)
                if not is_done(folder, made_from):
                    write_pruned(folder, checkpoint, plan, made_from, config.parallel.tensor)
    return scores


def _part_way(config: ScoreConfig, checkpoint: Checkpoint, number: int):
    """The target of one round among several: so far on the way from the source to the last target.

    Layers that are named rather than counted go in the first round.
    """
    source, part = checkpoint.shape, number / config.rounds
    target = resolve_target(source, config.target, config.parallel)

    def between(has: int, wanted: int, split: bool = False) -> int:
        multiple = 1
        if split:
            # What tensor-parallel ranks share: a multiple that does not depend on how many they are, as far as it can.
            both = math.gcd(has, wanted)
            multiple = math.lcm(min(both & -both, _MOST_RANKS), math.gcd(both, config.parallel.tensor))
        return max(wanted, round((has + (wanted - has) * part) / multiple) * multiple)

    attention, mlp = len(source.sublayers(ATTENTION)), len(source.sublayers(MLP))
    if target.keep_layers is not None:
        attention, mlp = target.attention, target.mlp
    return dataclasses.replace(
        target,
        attention=between(attention, target.attention),
        mlp=between(mlp, target.mlp),
        keep_layers=target.keep_layers if number == 1 else None,
        hidden=between(source.hidden, target.hidden),
        ffn=between(source.ffn, target.ffn, split=True),
        groups=between(source.num_query_groups, target.groups, split=True),
        heads_per_group=between(source.heads_per_group, target.heads_per_group, split=True),
    )


def _as_of_source(before: Scores | None, found: Scores, plan: Plan | None, number: int) -> Scores:
    """Scores of what a plan leaves of a network, laid over those of the rounds before, as scores of the whole."""
    if before is None:
        fields = {name: getattr(found, name) for name in WIDTH}
        if found.depth:
            fields["depth"] = next(iter(found.depth.values()))
        rounds = {name: torch.full_like(values, number, dtype=torch.int64) for name, values in fields.items()}
        return dataclasses.replace(found, rounds=rounds)

    def lay(name: str, target: Tensor, where, values: Tensor) -> None:
        target[where] = values
        before.rounds[name][where] = number

    lay("hidden", before.hidden, plan.hidden, found.hidden)
    for layer, values in enumerate(found.ffn):
        lay("ffn", before.ffn, (plan.source_layer(MLP, layer), plan.ffn[plan.position(MLP, layer)]), values)
    for layer, groups in enumerate(found.head):
        origin, position = plan.source_layer(ATTENTION, layer), plan.position(ATTENTION, layer)
        for group, heads, values in zip(plan.group[position], plan.head[position], groups, strict=True):
            lay("head", before.head, (origin, group, heads), values)
    by_layer = found.depth_settings.unit is Unit.LAYER
    units = [p // 2 for p in plan.sublayers[::2]] if by_layer else plan.sublayers
    for criterion, values in found.depth.items():
        lay("depth", before.depth[criterion], units, values)
    return before


def _round(output: Path, manifest: Manifest, number: int) -> tuple[Path, Manifest]:
    """Folder of the checkpoint between two rounds, beside the scores, and what it is made from."""
    made_from = Manifest("checkpoint", parents=manifest.parents, config=manifest.config, verb="score")
    return output.with_name(f"{output.name}.round_{number}"), made_from
