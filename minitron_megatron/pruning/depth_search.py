"""Chooses which layers or sublayers a depth search skips next."""

import torch
from torch import Tensor

from minitron_megatron.config.schema import DepthSearch, ScoreConfig, Unit
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.network import Network
from minitron_megatron.pruning.scores import DEPTH, DepthSettings
from minitron_megatron.pruning.skip_runner import WHOLE, Skipped
from minitron_megatron.pruning.target import resolve_target

_LAYERS = "layers"


class DepthSearcher:
    """The state of a depth search.

    Attributes:
        base: sublayers that are dropped so far.
        paths: what to skip next, each a superset of `base`; empty at the end.
        scores: by criterion, `[unit]`, NaN where nothing was skipped.
        rounds: of the scores, for a greedy search.
        settings: of the scores.

    Raises:
        ConfigError: the target drops nothing, or more than is unprotected.
    """

    def __init__(self, network: Network, config: ScoreConfig):
        depth = config.depth
        self.network = network
        self.by_layer = depth.unit is Unit.LAYER
        self.left = {} if depth.search is DepthSearch.SINGLE else self._surplus(config)
        drop = sum(self.left.values()) or 1
        self.settings = DepthSettings(depth.unit, depth.search, drop, depth.protect_first, depth.protect_last)
        self.units: list[Skipped] = [frozenset(unit) for unit in self.settings.units(network)]
        # A single search scores protected units as well; the plan keeps them.
        protected = [] if depth.search is DepthSearch.SINGLE else self.settings.protected(network)
        self.free = [number for number in range(len(self.units)) if number not in protected]
        self.deciding = depth.criteria[0].value if depth.criteria else ""
        self.scores = {
            criterion.value: torch.full((len(self.units),), torch.nan, dtype=torch.float64)
            for criterion in depth.criteria
        }
        self.rounds: dict[str, Tensor] = {}
        self.base: Skipped = WHOLE
        self.candidates: list[int] = []
        self.paths: list[Skipped] = []
        if not self.scores:
            return
        for kind, count in self.left.items():
            own = [number for number in range(len(self.units)) if self._kind(number) == kind]
            free = len(set(own) & set(self.free))
            if count > free:
                raise ConfigError(
                    [
                        f"depth.protect_first = {depth.protect_first} and depth.protect_last = {depth.protect_last} "
                        f"leave {free} of {len(own)} {self._title(kind)}, and the target drops {count}: protect less"
                    ]
                )
        if self._is_greedy:
            self.rounds[DEPTH] = torch.full((len(self.units),), drop + 1, dtype=torch.int64)
        self._next()

    @property
    def num_sweeps(self) -> int:
        """Number of passes over samples and choices."""
        return self.settings.drop if self._is_greedy and self.paths else int(bool(self.paths))

    def take(self, effects: dict[str, Tensor]) -> None:
        """Records the effects of skipping `paths`, and chooses the next paths.

        Args:
            effects: by criterion, `[path]`.
        """
        for name, values in effects.items():
            self.scores[name][self.candidates] = values
        self.paths = []
        if not self._is_greedy:
            return
        decide = effects[self.deciding].tolist()
        # Among equals the last, as in a plan.
        gone = min(zip(decide, self.candidates, strict=True), key=lambda one: (one[0], -one[1]))[1]
        self.free.remove(gone)
        self.base |= self.units[gone]
        self.left[self._kind(gone)] -= 1
        remaining = sum(self.left.values())
        self.rounds[DEPTH][gone] = self.settings.drop - remaining
        if remaining:
            self._next()

    @property
    def _is_greedy(self) -> bool:
        return self.settings.search is DepthSearch.GREEDY

    def _next(self) -> None:
        length = self.settings.drop if self.settings.search is DepthSearch.BLOCK else 1
        free = {number for number in self.free if self.left.get(self._kind(number), 1) > 0}
        self.candidates = [number for number in sorted(free) if free.issuperset(range(number, number + length))]
        self.paths = [self.base.union(*self.units[number : number + length]) for number in self.candidates]

    def _kind(self, number: int) -> str:
        """Returns the name of a unit's kind."""
        return _LAYERS if self.by_layer else self.network.sublayers[number].name

    def _title(self, name: str) -> str:
        return next((f"{kind.title} sublayers" for kind in self.network.kinds if kind.name == name), name)

    def _surplus(self, config: ScoreConfig) -> dict[str, int]:
        """Returns how many units of each kind the target drops."""
        target = resolve_target(self.network, config.target, config.parallel)
        if self.by_layer:
            surplus = {_LAYERS: len(self.network.layers) - (target.layers or 0)}
        else:
            counts = {kind.name: len(self.network.positions(kind)) for kind in self.network.kinds}
            surplus = {name: count - target.counts[name] for name, count in counts.items()}
        if not any(surplus.values()):
            raise ConfigError(
                [f"depth.search = {config.depth.search.value}, and target leaves no {config.depth.unit.value} out"]
            )
        return surplus
