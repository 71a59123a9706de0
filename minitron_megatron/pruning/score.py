"""The verb `score`: scores a checkpoint on a calibration set."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.artifacts.output import is_done, writing
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.compose import to_plain
from minitron_megatron.config.schema import ScoreConfig
from minitron_megatron.data.choices import ChoiceSamples, read_questions
from minitron_megatron.data.corpus import text_parents
from minitron_megatron.data.encoding import load_tokenizer
from minitron_megatron.data.samples import Samples, require_tokens, training_samples
from minitron_megatron.data.tokens import Corpus, prepare_corpus
from minitron_megatron.errors import raise_if_any
from minitron_megatron.model.axes import HIDDEN
from minitron_megatron.model.build import build_model, build_problems
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.positions import warn_of_positions
from minitron_megatron.parallel.collectives import rank0_first
from minitron_megatron.parallel.context import ParallelContext, parallel_context
from minitron_megatron.pruning.depth_search import DepthSearcher
from minitron_megatron.pruning.make_plan import plan_for
from minitron_megatron.pruning.plan import Plan, flat, nested
from minitron_megatron.pruning.resumable_sums import ResumableSums
from minitron_megatron.pruning.score_model import score_model
from minitron_megatron.pruning.scores import DEPTH, Scores
from minitron_megatron.pruning.slicing import Pruned, write_pruned
from minitron_megatron.pruning.target import Target, resolve_target

logger = logging.getLogger(__name__)

# The sizes between two rounds allow up to this many tensor-parallel ranks.
_MOST_RANKS = 64


@sole_writer
def score(config: ScoreConfig) -> Path:
    """Scores every hidden channel, neuron, head and layer of a checkpoint on a calibration set.

    An interrupted scoring resumes from its last saved sums when it is started again with the same settings.

    Returns:
        the folder with `scores.safetensors`.

    Raises:
        CheckpointError: the checkpoint is not whole.
        DataError: the text is shorter than one sequence or has no token that counts, a question is malformed, or
            activations are not finite.
        ConfigError: the layout does not fit the network or the world, or the target cannot be reached.
    """
    checkpoint, output = Checkpoint(config.checkpoint), Path(config.output)
    raise_if_any(build_problems(checkpoint.network, config.parallel, "checkpoint"))
    warn_of_positions(checkpoint.network.max_positions, config.data.sequence_length, "the checkpoint")
    questions = read_questions(Path(config.depth.choices)) if config.depth.choices else None
    settings, round_targets = _relevant_settings(config, checkpoint)
    parents = [Parent.of("checkpoint", checkpoint.root), *text_parents(config.data.text)]
    if config.depth.choices:
        parents.append(Parent.of("choices", Path(config.depth.choices)))
    manifest = Manifest("scores", checkpoint.network.to_dict(), parents, settings, verb="score")
    if is_done(output, manifest):
        return output
    for number in range(1, config.rounds) if config.save_rounds else ():
        is_done(*_round(output, manifest, number))  # raises now if the folder holds something else
    with parallel_context(config.parallel) as ctx:
        corpus = rank0_first(lambda: prepare_corpus(config.data, checkpoint.huggingface_folder))
        config = _without_repeats(config, corpus)
        samples = training_samples(corpus, config.data, config.num_samples)
        require_tokens(samples, "calibration", config.num_samples)
        choices = None
        if questions:
            tokenizer = load_tokenizer(checkpoint.huggingface_folder)
            multiple = config.parallel.tensor if config.parallel.sequence else 1
            choices = ChoiceSamples(questions, tokenizer, multiple)
        resumable = ResumableSums(
            ctx,
            config.micro_batch,
            output.with_name(f".{output.name}.sums"),
            json.dumps(
                [
                    parents[0].fingerprint,
                    corpus.fingerprint,
                    manifest.cache_key,
                    [round_target.sizes for round_target in round_targets],
                ]
            ),
            config.save_every,
        )
        scores = _score_in_rounds(config, checkpoint, manifest, ctx, samples, choices, resumable)
        scores.settings = _description(config, corpus.fingerprint)
        if ctx.is_main:
            with writing(output, manifest) as folder:
                scores.write(folder)
        resumable.remove()
    return output


def _without_repeats(config: ScoreConfig, corpus: Corpus) -> ScoreConfig:
    """Returns the settings with no more samples than the text has sequences: more would only repeat some."""
    num_samples = min(config.num_samples, corpus.num_sequences(config.data.sequence_length))
    if num_samples < config.num_samples:
        logger.warning("num_samples = %d: the text has only %d sequences", config.num_samples, num_samples)
    return dataclasses.replace(config, num_samples=num_samples)


def _relevant_settings(config: ScoreConfig, checkpoint: Checkpoint) -> tuple[dict[str, Any], list[Target]]:
    """Returns the settings that scores depend on, and the target of each round but the last.

    Raises:
        ConfigError: the target cannot be reached, or the network after a round cannot be built.
    """
    settings = to_plain(config)
    if not config.depends_on_target:
        # These scores are reused for other targets.
        del settings["target"]
        return settings, []
    # As numbers, because another layout may round the same fraction differently.
    settings["target"] = resolve_target(checkpoint.network, config.target, config.parallel).sizes
    DepthSearcher(checkpoint.network, config)  # raises now if the target cannot be searched for
    round_targets = [_round_target(config, checkpoint, number) for number in range(1, config.rounds)]
    for number, round_target in enumerate(round_targets, start=1):
        if left := round_target.network_of(checkpoint.network):
            raise_if_any(build_problems(left, config.parallel, f"what round {number} leaves"))
    return settings, round_targets


def _description(config: ScoreConfig, corpus: str) -> dict[str, Any]:
    """Returns how scores were made, for display."""
    return {
        **{
            axis: f"{how.criterion.value}, {how.sequence_aggregation.value} over tokens, "
            f"{how.batch_aggregation.value} over sequences"
            for axis, how in config.axes.items()
        },
        "neurons": config.neurons.value,
        "rounds": config.rounds,
        "num_samples": config.num_samples,
        "sequence_length": config.data.sequence_length,
        "corpus": corpus,
    }


def _score_in_rounds(
    config: ScoreConfig,
    checkpoint: Checkpoint,
    manifest: Manifest,
    ctx: ParallelContext,
    samples: Samples,
    choices: ChoiceSamples | None,
    resumable: ResumableSums,
) -> Scores:
    """Scores, prunes a little on the way to the target, scores what is left, and so on.

    The plan so far is applied while loading, so that nothing has to be written between rounds.
    """

    def score_round(number: int, source: Checkpoint | Pruned) -> Scores:
        if config.rounds > 1:
            logger.info("round %d of %d: %.1fM parameters", number, config.rounds, num_parameters(source.network) / 1e6)
        model_chunks = build_model(source.network, ctx, config.dtype)
        load_weights(model_chunks, source, ctx)
        return score_model(model_chunks, source.network, ctx, samples, config, choices, resumable, f"{number}.")

    latest = score_round(1, checkpoint)
    latest.checkpoint = manifest.parents[0].fingerprint
    if config.rounds == 1:
        return latest
    scores, plan = _of_first_round(latest), None
    for number in range(2, config.rounds + 1):
        step = plan_for(latest, _round_target(config, checkpoint, number - 1))
        plan = plan.then(step) if plan else step
        if config.save_rounds:
            folder, made_from = _round(Path(config.output), manifest, number - 1)
            if not is_done(folder, made_from):
                write_pruned(folder, checkpoint, plan, made_from, config.parallel.tensor)
        latest = score_round(number, Pruned(checkpoint, plan))
        _lay_over(scores, latest, plan, number)
    return scores


def _round_target(config: ScoreConfig, checkpoint: Checkpoint, number: int) -> Target:
    """Returns the target of one of several rounds, between the source and the final target.

    `target.keep_layers` is applied in the first round.
    """
    source, part = checkpoint.network, number / config.rounds
    target = resolve_target(source, config.target, config.parallel)

    def between(has: int, wanted: int, split: bool = False) -> int:
        multiple = 1
        if split:
            # Tensor-parallel ranks share these: a multiple that depends on their number as little as possible.
            both = math.gcd(has, wanted)
            multiple = math.lcm(min(both & -both, _MOST_RANKS), math.gcd(both, config.parallel.tensor))
        return max(wanted, round((has + (wanted - has) * part) / multiple) * multiple)

    sublayers = []
    for sublayer, wanted in zip(source.sublayers, target.sublayers, strict=True):
        names = [axis.axis.name for axis in sublayer.prunable]
        lengths = {name: between(sublayer.sizes[name], wanted.sizes[name], split=True) for name in names}
        sublayers.append(sublayer.resized(lengths))
    layers, counts = target.layers, target.counts
    if target.keep_layers is None:
        layers = None if layers is None else between(len(source.layers), layers)
        has = {kind.name: len(source.positions(kind)) for kind in source.kinds}
        counts = {name: between(has[name], count) for name, count in counts.items()}
    return dataclasses.replace(
        target,
        hidden=between(source.hidden_size, target.hidden),
        sublayers=tuple(sublayers),
        counts=counts,
        layers=layers,
        keep_layers=target.keep_layers if number == 1 else None,
    )


def _of_first_round(latest: Scores) -> Scores:
    """Returns the scores of the first of several rounds, with the number of that round for every element."""

    def rounds(values: Tensor) -> Tensor:
        return torch.ones_like(values, dtype=torch.int64)

    depth = {DEPTH: rounds(next(iter(latest.depth.values())))} if latest.depth else {}
    return dataclasses.replace(
        latest,
        rounds={HIDDEN.name: rounds(latest.hidden), **depth},
        element_rounds={setting: list(map(rounds, values)) for setting, values in latest.elements.items()},
    )


def _lay_over(before: Scores, latest: Scores, plan: Plan, number: int) -> None:
    """Writes the scores of a round over those of the rounds before it.

    Args:
        before: of the whole network; changed.
        latest: of what the plan leaves of it.
        plan: what was scored in this round.
        number: of the round.
    """

    def lay(target: Tensor, rounds: Tensor, where: list[int] | tuple[int, list[int]], values: Tensor) -> None:
        target[where] = values
        rounds[where] = number

    lay(before.hidden, before.rounds[HIDDEN.name], plan.hidden, latest.hidden)
    for position, origin in enumerate(plan.sublayers):
        sublayer, kept = before.network.sublayers[origin], plan.elements[origin]
        scores, rounds = before.of(origin), before.rounds_of(origin)
        for setting, values in latest.of(position).items():
            outer = sublayer.outer(sublayer.axis(setting))
            if outer is None:
                lay(scores[setting], rounds[setting], flat(kept[setting]), values)
                continue
            for element, within, own in zip(flat(kept[outer.setting]), nested(kept[setting]), values, strict=True):
                lay(scores[setting], rounds[setting], (element, within), own)
    units = before.depth_settings.units(before.network)
    left = [index for index, unit in enumerate(units) if set(unit) <= set(plan.sublayers)]
    for criterion, values in latest.depth.items():
        lay(before.depth[criterion], before.rounds[DEPTH], left, values)


def _round(output: Path, manifest: Manifest, number: int) -> tuple[Path, Manifest]:
    """Returns the folder of the checkpoint between two rounds, beside the scores, and its manifest."""
    made_from = Manifest("checkpoint", parents=manifest.parents, config=manifest.config, verb="score")
    return output.with_name(f"{output.name}.round_{number}"), made_from
