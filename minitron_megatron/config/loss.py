"""The settings of the loss."""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from minitron_megatron.config import axes
from minitron_megatron.config.checks import at_least
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.reader import near
from minitron_megatron.config.schedule import Schedule


class Divergence(str, Enum):
    """How far the student's next-token distribution is from the teacher's."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JENSEN_SHANNON = "jensen_shannon"
    SKEWED_KL = "skewed_kl"
    TOTAL_VARIATION = "total_variation"
    MSE = "mse"
    COSINE = "cosine"


@dataclass
class LogitsConfig:
    """The divergence between the next-token distributions of teacher and student.

    Attributes:
        divergence: divergence to minimise; forward_kl is KL(teacher || student), the papers' choice.
        temperature: softmax temperature of both distributions.
        temperature_squared: multiply the divergence by temperature^2, which preserves the scale of its gradients.
        beta: weight of the teacher in the mixture of jensen_shannon.
        skew: weight of the teacher in the mixture of skewed_kl.
        top_k: use only the teacher's top-k tokens; null for the whole vocabulary.
        tail: with top_k, add the other tokens as one more class; otherwise the teacher's top-k are renormalised.
    """

    divergence: Divergence = Divergence.FORWARD_KL
    temperature: float = 1.0
    temperature_squared: bool = True
    beta: float = 0.5
    skew: float = 0.1
    top_k: int | None = None
    tail: bool = False

    @property
    def scale(self) -> float:
        """Factor of the divergence."""
        return self.temperature**2 if self.temperature_squared else 1.0

    @property
    def is_whole_forward_kl(self) -> bool:
        """Whether it is KL(teacher || student) over the whole vocabulary."""
        return self.divergence is Divergence.FORWARD_KL and self.top_k is None

    def vocab_problems(self, vocab: int) -> list[str]:
        """Returns why these settings do not work with a vocabulary of this size."""
        if self.top_k and self.top_k + self.tail > vocab:
            return [
                f"loss.logits.top_k = {self.top_k} is more than the vocabulary's {vocab} tokens leave room for: choose "
                f"fewer, or null for all of them"
            ]
        return []

    def problems(self, where: str = "loss.logits.") -> list[str]:
        problems = at_least(where, "top_k", self.top_k, 1)
        if self.temperature <= 0:
            problems.append(f"{where}temperature = {self.temperature}: must be above 0; 1 changes nothing")
        for name, kind in (("beta", Divergence.JENSEN_SHANNON), ("skew", Divergence.SKEWED_KL)):
            if self.divergence is kind and not 0 < getattr(self, name) < 1:
                problems.append(f"{where}{name} = {getattr(self, name)}: must be between 0 and 1, and neither")
        if self.top_k and not self.tail and self.divergence in (Divergence.REVERSE_KL, Divergence.COSINE):
            problems.append(
                f"{where}divergence = {self.divergence.value} with {where}top_k does not see how much the student "
                f"gives to all other tokens: set {where}tail=true"
            )
        if self.tail and self.top_k is None:
            problems.append(f"{where}tail = true without {where}top_k: set {where}top_k, or leave it out")
        return problems


LAYER, EMBEDDING = "layer", "embedding"
"""Where hidden states are compared: the output of a transformer layer, residual stream included, or of the embedding.
Besides these, the name of a kind of sublayer: the output of that sublayer, before it is added to the stream."""


def all_points() -> list[str]:
    """Returns all points at which hidden states can be compared."""
    return [LAYER, *axes.sublayers(), EMBEDDING]


class HiddenLoss(str, Enum):
    """Distance between hidden states of student and teacher."""

    COSINE = "cosine"  # 1 - cosine
    MSE = "mse"  # mean over the channels
    SQUAREHEAD = "squarehead"  # the same, relative to the mean square of the teacher's states
    INFONCE = "infonce"  # contrast with the teacher's states of the micro-batch's other tokens, over all replicas


class LayerMap(str, Enum):
    """How layers of student and teacher are paired."""

    UNIFORM = "uniform"  # by relative depth; the last with the last
    END_ALIGNED = "end_aligned"  # by distance from the end


class Projection(str, Enum):
    """How hidden states of the student are projected to the teacher's width."""

    NONE = "none"
    SHARED = "shared"  # one linear map for all pairs
    PER_PAIR = "per_pair"


class Balance(str, Enum):
    """How the hidden losses are weighted against the divergence of the predictions."""

    CONSTANT = "constant"
    DYNAMIC = "dynamic"  # by the ratio of the two in the previous step


@dataclass
class HiddenConfig:
    """Losses between hidden states.

    Attributes:
        weight: weight of the mean over all pairs; 0 disables these losses.
        balance: constant, or dynamic, which multiplies the weight by alpha: the divergence of the predictions divided
            by the mean over the pairs, both of the previous step (Minitron, 2407.14679, section 3).
        loss: distance between two hidden states.
        temperature: of infonce's softmax over tokens.
        points: outputs to compare: layer, embedding, or a kind of sublayer such as attention or mlp.
        map: how layers of student and teacher are paired.
        pairs: pairs of student and teacher layers instead of the map, counted from 0, as in [[0,1],[1,3]]. An
            attention or MLP whose other half was dropped counts as a layer.
        projection: linear projection from the student's width to the teacher's, trained with the student.
    """

    weight: float = 0.0
    balance: Balance = Balance.CONSTANT
    loss: HiddenLoss = HiddenLoss.COSINE
    temperature: float = 0.07
    points: list[str] = field(default_factory=lambda: [LAYER])
    map: LayerMap = LayerMap.UNIFORM
    pairs: list[list[int]] | None = None
    projection: Projection = Projection.NONE

    def problems(self, where: str = "loss.hidden.") -> list[str]:
        problems = at_least(where, "weight", self.weight, 0)
        if self.temperature <= 0:
            problems.append(f"{where}temperature = {self.temperature}: must be above 0; 0.07 is usual")
        if self.temperature != HiddenConfig.temperature and self.loss is not HiddenLoss.INFONCE:
            problems.append(
                f"{where}temperature = {self.temperature}, and {where}loss = {self.loss.value} has none: leave it out, "
                f"or set {where}loss=infonce"
            )
        if not self.points:
            problems.append(f"{where}points is empty: name one of {', '.join(all_points())}")
        problems += [
            f"{where}points has {point!r}: must be one of {', '.join(all_points())}"
            for point in self.points
            if point not in all_points()
        ]
        for pair in self.pairs or ():
            if len(pair) != 2:
                problems.append(
                    f"{where}pairs has {pair}: must be a student's and a teacher's layer, as in [[0,1],[1,3]]"
                )
        for name in ("points", "pairs"):
            given = getattr(self, name) or []
            if any(given.count(one) > 1 for one in given):
                problems.append(f"{where}{name} names something twice: name each once")
        if self.pairs == []:
            problems.append(f"{where}pairs is empty: name pairs of layers, or set it to null for {where}map")
        return problems


SCHEDULED = (
    "kd_logits_weight",
    "lm_weight",
    "hidden.weight",
    "logits.temperature",
    "logits.beta",
    "logits.skew",
)
"""Settings of the loss that may have a schedule."""


@dataclass
class LossConfig:
    """What the student minimises, per valid token.

    Attributes:
        kd_logits_weight: weight of the divergence from the teacher's predictions.
        lm_weight: weight of the cross-entropy on the text.
        schedule: settings of this section that change over the steps, from 1, by name: a weight, or a temperature, beta
            or skew of `logits`. As in {lm_weight:{points:[[1,1.0],[500,0.1]],shape:cosine}}: what it is at some steps,
            and how it gets from each to the next (linear, cosine, or constant, which stays until then).
        chunk_tokens: tokens whose logits are computed at a time, which bounds memory.
        logits: divergence of the predictions.
        hidden: losses between hidden states.
    """

    kd_logits_weight: float = 1.0
    lm_weight: float = 0.0
    schedule: dict[str, Schedule] = field(default_factory=dict)
    chunk_tokens: int = field(default=512, metadata=SAME_RESULT)
    logits: LogitsConfig = field(default_factory=LogitsConfig)
    hidden: HiddenConfig = field(default_factory=HiddenConfig)

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss uses the teacher, at any step."""
        return any(self.teacher_weights.values())

    @property
    def teacher_weights(self) -> dict[str, float]:
        """The largest weights of the losses that use the teacher, by name."""
        largest = self.largest
        return {"kd_logits_weight": largest.kd_logits_weight, "hidden.weight": largest.hidden.weight}

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules by name, but those in which `problems` finds something."""
        return {name: own for name, own in self.schedule.items() if name in SCHEDULED and not own.problems("")}

    def at(self, step: int) -> "LossConfig":
        """Returns the settings at a step, counted from 1."""
        return self._with({name: schedule.at(step) for name, schedule in self.schedules.items()})

    @property
    def largest(self) -> "LossConfig":
        """The settings with the largest value of each that changes."""
        return self._with({name: schedule.largest for name, schedule in self.schedules.items()})

    def steps_of_changes(self) -> list[int]:
        """Returns the steps of all points of schedules, in order."""
        return sorted({int(step) for schedule in self.schedules.values() for step, _ in schedule.points})

    def _with(self, values: dict[str, float]) -> "LossConfig":
        """Returns the settings with some others, by dotted name, and without schedules."""
        config = replace(self, schedule={}, logits=replace(self.logits), hidden=replace(self.hidden))
        for name, value in values.items():
            *section, setting = name.split(".")
            setattr(getattr(config, section[0]) if section else config, setting, value)
        return config

    def problems(self, where: str = "loss.") -> list[str]:
        problems, largest = self._schedule_problems(where), self.largest
        for step in sorted({1, *self.steps_of_changes()}):
            at_step = self.at(step)
            problems += at_step._own_problems(where)
            if not (at_step.kd_logits_weight or at_step.lm_weight):
                when = f" at step {step}" if self.schedule else ""
                problems.append(
                    f"{where}kd_logits_weight and {where}lm_weight are both 0{when}: raise one, or nothing is learned"
                )
        problems = list(dict.fromkeys(problems))
        if self.hidden.balance is Balance.DYNAMIC and largest.hidden.weight and not largest.kd_logits_weight:
            problems.append(
                f"{where}hidden.balance = dynamic weighs against {where}kd_logits_weight, which is 0: raise it, or set "
                f"{where}hidden.balance=constant"
            )
        return problems

    def _own_problems(self, where: str) -> list[str]:
        """Returns what is wrong with the settings of a step."""
        problems = at_least(where, "chunk_tokens", self.chunk_tokens, 1)
        for name in ("kd_logits_weight", "lm_weight"):
            problems += at_least(where, name, getattr(self, name), 0)
        return [*problems, *self.logits.problems(f"{where}logits."), *self.hidden.problems(f"{where}hidden.")]

    def _schedule_problems(self, where: str) -> list[str]:
        """Returns what is wrong with the schedules, and with settings beside them, one sentence each."""
        problems = []
        used_by = {"logits.beta": Divergence.JENSEN_SHANNON, "logits.skew": Divergence.SKEWED_KL}
        for name, own in self.schedule.items():
            if name not in SCHEDULED:
                problems.append(f"{where}schedule has {name}, which cannot change: {near(name, list(SCHEDULED))}")
                continue
            problems += own.problems(f"{where}schedule.{name}.")
            if (divergence := used_by.get(name)) and self.logits.divergence is not divergence:
                problems.append(
                    f"{where}schedule has {name}, which {where}logits.divergence = {self.logits.divergence.value} does "
                    f"not use: leave it out, or set {where}logits.divergence={divergence.value}"
                )
            value, first = _setting(self, name), own.points[0][1] if own.points and own.points[0][1:] else None
            if first is not None and value not in (_setting(LossConfig(), name), first):
                problems.append(
                    f"{where}{name} = {value}, and {where}schedule.{name} begins with {first}: leave out the first one"
                )
        return problems


def _setting(config: LossConfig, name: str) -> float:
    """Returns a setting by its dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return float(value)
