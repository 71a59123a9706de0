"""The settings of the loss."""

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from minitron_megatron.config import axes
from minitron_megatron.config.checks import at_least
from minitron_megatron.config.fields import SAME_RESULT


class Schedule(str, Enum):
    """How a weight changes from its first value to its last."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


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
        points: outputs to compare: layer, embedding, or a kind of sublayer such as attention or mlp.
        map: how layers of student and teacher are paired.
        pairs: pairs of student and teacher layers instead of the map, counted from 0, as in [[0,1],[1,3]]. An
            attention or MLP whose other half was dropped counts as a layer.
        projection: linear projection from the student's width to the teacher's, trained with the student.
    """

    weight: float = 0.0
    balance: Balance = Balance.CONSTANT
    loss: HiddenLoss = HiddenLoss.COSINE
    points: list[str] = field(default_factory=lambda: [LAYER])
    map: LayerMap = LayerMap.UNIFORM
    pairs: list[list[int]] | None = None
    projection: Projection = Projection.NONE

    def problems(self, where: str = "loss.hidden.") -> list[str]:
        problems = at_least(where, "weight", self.weight, 0)
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


@dataclass
class LossConfig:
    """What the student minimises, per valid token.

    Attributes:
        kd_logits_weight: weight of the divergence from the teacher's predictions.
        lm_weight: weight of the cross-entropy on the text.
        lm_weight_end: final value of lm_weight; null keeps it constant.
        lm_schedule: schedule from lm_weight to lm_weight_end.
        lm_schedule_steps: steps until lm_weight_end is reached; null for all steps of the run.
        chunk_tokens: tokens whose logits are computed at a time, which bounds memory.
        logits: divergence of the predictions.
        hidden: losses between hidden states.
    """

    kd_logits_weight: float = 1.0
    lm_weight: float = 0.0
    lm_weight_end: float | None = None
    lm_schedule: Schedule = Schedule.CONSTANT
    lm_schedule_steps: int | None = None
    chunk_tokens: int = field(default=512, metadata=SAME_RESULT)
    logits: LogitsConfig = field(default_factory=LogitsConfig)
    hidden: HiddenConfig = field(default_factory=HiddenConfig)

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss uses the teacher."""
        return bool(self.kd_logits_weight or self.hidden.weight)

    def at(self, step: int, steps: int) -> "LossConfig":
        """Returns the weights at a step of a run of `steps`, counted from 1."""
        if self.lm_schedule is Schedule.CONSTANT:
            return self
        last = self.lm_schedule_steps or steps
        part = min((step - 1) / max(last - 1, 1), 1.0) if step < last else 1.0
        if self.lm_schedule is Schedule.COSINE:
            part = (1 - math.cos(math.pi * part)) / 2
        assert self.lm_weight_end is not None  # or `problems` has something to say
        weight = self.lm_weight + part * (self.lm_weight_end - self.lm_weight)
        return replace(self, lm_weight=weight, lm_weight_end=None, lm_schedule=Schedule.CONSTANT)

    def problems(self, where: str = "loss.") -> list[str]:
        problems = at_least(where, "chunk_tokens", self.chunk_tokens, 1)
        for name in ("kd_logits_weight", "lm_weight", "lm_weight_end"):
            problems += at_least(where, name, getattr(self, name), 0)
        problems += at_least(where, "lm_schedule_steps", self.lm_schedule_steps, 1)
        problems += [*self.logits.problems(f"{where}logits."), *self.hidden.problems(f"{where}hidden.")]
        if not (self.kd_logits_weight or self.lm_weight or self.lm_weight_end):
            problems.append(
                f"{where}kd_logits_weight and {where}lm_weight are both 0: raise one, or nothing is learned"
            )
        if self.hidden.balance is Balance.DYNAMIC and self.hidden.weight and not self.kd_logits_weight:
            problems.append(
                f"{where}hidden.balance = dynamic weighs against {where}kd_logits_weight, which is 0: raise it, or set "
                f"{where}hidden.balance=constant"
            )
        if (self.lm_schedule is Schedule.CONSTANT) != (self.lm_weight_end is None):
            problems.append(
                f"{where}lm_schedule = {self.lm_schedule.value} and {where}lm_weight_end = {self.lm_weight_end}: set "
                f"both, lm_schedule to linear or cosine, or neither"
            )
        return problems
