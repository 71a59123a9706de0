"""Scores a model in memory: runs it on a calibration set, and turns the sums into scores."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import pad

from minitron_megatron.config.parallel import ModelParallelConfig
from minitron_megatron.config.schema import AxisScoring, Criterion, DepthCriterion, ScoreConfig
from minitron_megatron.data.choices import ChoiceSamples
from minitron_megatron.data.samples import Samples
from minitron_megatron.distillation.logit_change import MEASURES
from minitron_megatron.errors import ConfigError, DataError, raise_if_any
from minitron_megatron.model.axes import HIDDEN
from minitron_megatron.model.network import Network, layout_problems
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import Batch
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.progress import progress
from minitron_megatron.pruning.activation_stats import ActivationStats, ElementSpans, place_name
from minitron_megatron.pruning.depth_search import DepthSearcher
from minitron_megatron.pruning.resumable_sums import ResumableSums
from minitron_megatron.pruning.scores import Scores, batch_score, scored_axes
from minitron_megatron.pruning.skip_runner import WHOLE, Skipped, SkipRunner
from minitron_megatron.pruning.weight_norms import squared_weights

_NEED_OUTPUTS = {DepthCriterion.LOSS, DepthCriterion.KL, DepthCriterion.LOGITS}


def score_model(
    model_chunks: Sequence[MegatronModule],
    network: Network,
    ctx: ParallelContext,
    samples: Samples,
    config: ScoreConfig,
    choices: ChoiceSamples | None = None,
    resumable: ResumableSums | None = None,
    name: str = "",
) -> Scores:
    """Scores a model in memory on this rank's share of `samples`. Collective.

    Args:
        model_chunks: this rank's part of a model, one per virtual pipeline stage. For your own model see `network_of`
            and `current_context`.
        network: the whole network.
        ctx: this rank's place.
        samples: the calibration set; every sequence is read once over all data-parallel ranks.
        config: what to score and how; checkpoint, output and rounds are ignored.
        choices: questions, for accuracy.
        resumable: saves the sums at intervals.
        name: of this scoring in `resumable`.

    Returns:
        the same scores on every rank, for any layout.

    Raises:
        DataError: activations are not finite, or no token counts.
        ConfigError: a setting is invalid, no layer could be skipped, the layout cannot split the network, or `ctx` is
            not that of the model.
    """
    _require_fit(model_chunks, network, ctx, config, choices)
    calibration = _Calibration(model_chunks, network, ctx, samples, config, choices, resumable, name)
    watch = any(a.criterion in (Criterion.ACTIVATION, Criterion.ACTIVATION_WEIGHT) for a in config.axes.values())
    search = DepthSearcher(network, config)
    sums: dict[str, Tensor] = {}
    num_steps = calibration.num_steps(search.num_sweeps, watch)
    with (
        _evaluating(model_chunks),
        torch.no_grad(),
        watchdog(ctx.timeout_min) as heartbeat,
        progress("score", num_steps) as advance,
    ):

        def advance_all(steps: int = 1) -> None:
            heartbeat()
            advance(steps)

        calibration.advance = advance_all
        if watch or search.paths:
            sums = calibration.sweep(WHOLE, search.paths, watch)
        if search.paths:
            search.take(calibration.effects(sums))
        while search.paths:
            search.take(calibration.effects(calibration.sweep(search.base, search.paths, False)))
        hidden, elements = _width_scores(model_chunks, network, ctx, config, sums)
    return Scores(network, hidden, elements, depth=search.scores, depth_settings=search.settings, rounds=search.rounds)


def _require_fit(
    model_chunks: Sequence[MegatronModule],
    network: Network,
    ctx: ParallelContext,
    config: ScoreConfig,
    choices: ChoiceSamples | None,
) -> None:
    """Checks settings, network, layout and model against each other; see `score_model`.

    Raises:
        ConfigError: they do not fit.
    """
    depth = replace(config.depth, choices=None if choices is None else config.depth.choices or "choices")
    problems = replace(config, depth=depth).problems()
    raise_if_any(problems + layout_problems(network, ModelParallelConfig(ctx.layout.tensor)))
    model = model_chunks[0].config
    if model.sequence_parallel != ctx.layout.sequence:
        raise ConfigError(
            [
                f"ctx.layout.sequence = {ctx.layout.sequence}, and the model has sequence_parallel = "
                f"{model.sequence_parallel}: give current_context(sequence={model.sequence_parallel})"
            ]
        )


@contextmanager
def _evaluating(model_chunks: Sequence[MegatronModule]) -> Iterator[None]:
    """Puts a model into evaluation mode, and afterwards back into its former mode."""
    modes = [chunk.training for chunk in model_chunks]
    for chunk in model_chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(model_chunks, modes, strict=True):
            chunk.train(mode)


class _Calibration:
    """Runs a calibration set through a model, with and without some sublayers."""

    def __init__(
        self,
        model_chunks: Sequence[MegatronModule],
        network: Network,
        ctx: ParallelContext,
        samples: Samples,
        config: ScoreConfig,
        choices: ChoiceSamples | None,
        resumable: ResumableSums | None,
        name: str,
    ):
        self.model_chunks = model_chunks
        self.network = network
        self.ctx = ctx
        self.samples = samples
        self.num_samples = min(config.num_samples, len(samples))
        self.config = config
        self.choices = choices
        self.resumable = resumable or ResumableSums(ctx, config.micro_batch)
        self.name = name
        self.advance: Callable[[int], None] = lambda steps: None
        self.sweeps = 0
        # Accuracy needs only the questions.
        self.compares = bool(set(config.depth.criteria) - {DepthCriterion.ACCURACY})

    def num_steps(self, num_sweeps: int, watch: bool) -> int:
        """Returns the number of micro-batches of all passes, one of which may capture activations."""
        per_step = self.config.micro_batch * self.ctx.layout.replicas
        of_samples, of_choices = -(-self.num_samples // per_step), -(-len(self.choices or ()) // per_step)
        over_samples = num_sweeps if self.compares else 0
        return max(over_samples, int(watch)) * of_samples + num_sweeps * of_choices

    def sweep(self, base: Skipped, paths: list[Skipped], watch: bool) -> dict[str, Tensor]:
        """Makes one pass over the calibration set.

        Args:
            base: sublayers that all paths skip.
            paths: sets of sublayers to skip.
            watch: also capture activations of the whole network.

        Returns:
            sums over all samples, the same on every rank. For the criteria: `num_tokens`, `cosine` `[path]`,
            `outputs` `[whole and paths, measure]`, and `losses` `[whole and paths, choice]`. For activations: `sums` by
            setting and `num_sequences` of `ActivationStats`.
        """
        name = f"{self.name}{self.sweeps}"
        self.sweeps += 1
        sums = {}
        if watch or self.compares:
            sums = self._over_samples(name, base, paths if self.compares else [], watch)
        return sums if self.choices is None else {**sums, **self._over_choices(self.choices, name, base, paths)}

    def _over_samples(self, name: str, base: Skipped, paths: list[Skipped], watch: bool) -> dict[str, Tensor]:
        config, ctx, device = self.config, self.ctx, self.ctx.device
        networks = [WHOLE, *paths]
        how = {setting: axis.sequence_aggregation for setting, axis in config.axes.items()}
        stats = ActivationStats(self.model_chunks, self.network, ctx, how, config.neurons)
        runner = SkipRunner(self.network, ctx, base, paths, bool(_NEED_OUTPUTS & set(config.depth.criteria)))
        outputs = torch.zeros(len(networks), len(MEASURES), dtype=torch.float64, device=device)
        num_tokens = torch.zeros((), dtype=torch.float64, device=device)
        sums = {"cosine": runner.cosine, "outputs": outputs, "num_tokens": num_tokens}
        if watch:
            sums |= {**stats.sums, "num_sequences": stats.num_sequences}

        def add(batch: Batch) -> Tensor:
            if watch:
                stats.set_mask(batch["loss_mask"])
            changes = runner.run(self.model_chunks, batch, stats if watch else nullcontext())
            if self._counts_here:
                mask = batch["loss_mask"].transpose(0, 1).flatten()
                num_tokens.add_(mask.sum())
                if changes is not None:
                    outputs.add_((changes * mask).sum(-1, dtype=torch.float64))
            faults = [_first_fault(outputs, self._behind), _first_fault(runner.cosine, self._behind + 1)]
            return torch.stack([stats.add_up(), *faults]).min()

        describe = self._describe(networks)
        total = self.resumable.over(name, self.samples, self.num_samples, sums, add, describe, self.advance)
        if not total["num_tokens"]:
            raise DataError("the calibration samples have no token that counts: give others, or another loss_mask")
        return total

    def _over_choices(
        self, choices: ChoiceSamples, name: str, base: Skipped, paths: list[Skipped]
    ) -> dict[str, Tensor]:
        networks = [WHOLE, *paths]
        runner = SkipRunner(self.network, self.ctx, base, paths, outputs=True)
        losses = torch.zeros(len(networks), len(choices), dtype=torch.float64, device=self.ctx.device)

        def add(batch: Batch) -> Tensor:
            changes = runner.run(self.model_chunks, batch, nullcontext())
            if changes is not None and self._counts_here:
                mask = batch["loss_mask"].transpose(0, 1)
                of_samples = (changes[:, 0].view(-1, *mask.shape) * mask).sum(1, dtype=torch.float64)
                losses.index_add_(1, batch["row"], of_samples)
            return _first_fault(losses, self._behind)

        describe = self._describe(networks)
        return self.resumable.over(
            f"{name}.choices", choices, len(choices), {"losses": losses}, add, describe, self.advance
        )

    @property
    def _counts_here(self) -> bool:
        """Whether this rank adds values that all ranks of its replica know."""
        return self.ctx.tensor_rank == 0 and self.ctx.is_last_stage

    @property
    def _behind(self) -> int:
        """Place of faults in outputs, behind all places of activations: first the whole network, then the paths."""
        return len(self.network.sublayers) + 1

    def _describe(self, networks: list[Skipped]) -> Callable[[float], str]:
        def describe(place: float) -> str:
            if place < self._behind:
                return place_name(place, self.network)
            dropped = sorted(networks[int(place) - self._behind])
            return "states or predictions of the network" + (f" without sublayers {dropped}" if dropped else "")

        return describe

    def effects(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the effect of skipping each path, by criterion `[path]`, in the order of the settings."""

        def per_token(values: Tensor) -> Tensor:
            return values / sums["num_tokens"]

        def outputs(measure: str) -> Tensor:
            return sums["outputs"][:, MEASURES.index(measure)]

        choices = self.choices
        measures: dict[DepthCriterion, Callable[[], Tensor]] = {
            DepthCriterion.BLOCK_INFLUENCE: lambda: 1 - per_token(sums["cosine"]),
            DepthCriterion.LOSS: lambda: per_token(outputs("loss")[1:] - outputs("loss")[0]),
            DepthCriterion.KL: lambda: per_token(outputs("kl")[1:]),
            DepthCriterion.LOGITS: lambda: outputs("logits")[1:] / outputs("logits")[0],
        }
        if choices is not None:
            measures[DepthCriterion.ACCURACY] = partial(_accuracy_lost, choices, sums["losses"])
        return {criterion.value: measures[criterion]() for criterion in self.config.depth.criteria}


def _accuracy_lost(choices: ChoiceSamples, losses: Tensor) -> Tensor:
    """Returns how much accuracy each path loses `[path]`, from losses `[whole network and paths, choice]`."""
    accuracy = torch.tensor([choices.accuracy(row) for row in losses], dtype=torch.float64)
    return accuracy[0] - accuracy[1:]


def _first_fault(values: Tensor, before: int) -> Tensor:
    """Returns `before` plus the index of the first entry of `[n, ...]` that is not finite, inf if all are finite."""
    places = torch.arange(before, before + len(values), device=values.device, dtype=torch.float64)
    is_finite = values.isfinite().unsqueeze(-1).flatten(1).all(1)
    return pad(places.where(~is_finite, torch.inf), (0, 1), value=torch.inf).min()


def _width_scores(
    model_chunks: Sequence[MegatronModule],
    network: Network,
    ctx: ParallelContext,
    config: ScoreConfig,
    sums: dict[str, Tensor],
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Returns the scores of hidden channels, and of the elements of all sublayers, as in `Scores`."""
    spans = ElementSpans(network)
    axes = {setting: config.axes[setting] for setting in spans.totals}
    generator = torch.Generator().manual_seed(config.seed)
    lengths = {**spans.totals, HIDDEN.name: network.hidden_size}
    chance = {n: torch.rand(length, generator=generator, dtype=torch.float64) for n, length in lengths.items()}
    squares = {
        criterion: squared_weights(model_chunks, network, ctx, outgoing=criterion is Criterion.ACTIVATION_WEIGHT)
        for criterion in (Criterion.WEIGHT, Criterion.ACTIVATION_WEIGHT)
        if criterion in {axis.criterion for axis in axes.values()}
    }

    def score(setting: str, axis: AxisScoring) -> Tensor:
        if axis.criterion is Criterion.RANDOM:
            return chance[setting]
        if axis.criterion is Criterion.WEIGHT:  # of a channel: over the whole network
            own = squares[axis.criterion][setting]
            return (own.view(-1, network.hidden_size).sum(0) if setting == HIDDEN.name else own).sqrt()
        first, second = sums[setting]
        activations = batch_score(first, second, sums["num_sequences"], axis.batch_aggregation)
        if axis.criterion is Criterion.ACTIVATION_WEIGHT:
            return activations * squares[axis.criterion][setting].sqrt()
        return activations

    scores = {setting: score(setting, axis) for setting, axis in axes.items()}
    elements = {}
    for kind, axis in scored_axes(network):
        shapes = [network.sublayers[position].score_shape(axis) for position in network.positions(kind)]
        parts = spans.split(axis.setting, scores[axis.setting])
        elements[axis.setting] = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return scores[HIDDEN.name].view(-1, network.hidden_size).sum(0), elements
