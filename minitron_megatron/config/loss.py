"""The settings of what a student minimises."""

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from minitron_megatron.config import axes
from minitron_megatron.config.checks import at_least
from minitron_megatron.config.fields import SAME_RESULT


class Schedule(str, Enum):
    """How a weight gets from its first value to its last."""

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
    """Which divergence of the predictions, and of what part of them.

    Attributes:
        divergence: forward_kl is KL(teacher || student), the papers' choice.
        temperature: logits are divided by it before the softmax.
        temperature_squared: multiply the divergence by temperature^2, which keeps the size of its gradients.
        beta: of jensen_shannon, the teacher's share in the mixture.
        skew: of skewed_kl, the teacher's share in the mixture.
        top_k: look at the teacher's so many likeliest tokens alone; null for all.
        tail: with top_k, all other tokens count as one more; else the teacher's top_k are made to sum to one.
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
        """What the divergence is multiplied by."""
        return self.temperature**2 if self.temperature_squared else 1.0

    @property
    def is_whole_forward_kl(self) -> bool:
        """Whether it is KL(teacher || student) over the whole vocabulary."""
        return self.divergence is Divergence.FORWARD_KL and self.top_k is None

    def vocab_problems(self, vocab: int) -> list[str]:
        """What cannot be done with so many tokens."""
        if self.top_k and self.top_k + self.tail > vocab:
            return [
                f"loss.logits.top_k = {self.top_k} is more than the vocabulary's {vocab} tokens leave room for: choose "
                f"fewer, or null for all of them"
            ]
        return []

    def problems(self, where: str = "loss.logits.") -> list[str]:
        found = at_least(where, "top_k", self.top_k, 1)
        if self.temperature <= 0:
            found.append(f"{where}temperature = {self.temperature}: must be above 0; 1 changes nothing")
        for name, kind in (("beta", Divergence.JENSEN_SHANNON), ("skew", Divergence.SKEWED_KL)):
            if self.divergence is kind and not 0 < getattr(self, name) < 1:
                found.append(f"{where}{name} = {getattr(self, name)}: must be between 0 and 1, and neither")
        if self.top_k and not self.tail and self.divergence in (Divergence.REVERSE_KL, Divergence.COSINE):
            found.append(
                f"{where}divergence = {self.divergence.value} with {where}top_k does not see how much the student "
                f"gives to all other tokens: set {where}tail=true"
            )
        if self.tail and self.top_k is None:
            found.append(f"{where}tail = true without {where}top_k: set {where}top_k, or leave it out")
        return found


LAYER, EMBEDDING = "layer", "embedding"
"""Points where a hidden state is taken: behind a transformer layer, residual stream included, and behind the embedding.
Beside them, the name of every kind of sublayer: what a layer's sublayer of that kind adds to the stream."""


def all_points() -> list[str]:
    """Points that a hidden state may be taken at."""
    return [LAYER, *axes.sublayers(), EMBEDDING]


class HiddenLoss(str, Enum):
    """How far a student's hidden state is from its teacher's."""

    COSINE = "cosine"  # 1 - cosine
    MSE = "mse"  # mean over the channels
    SQUAREHEAD = "squarehead"  # the same, relative to the mean square of the teacher's states


class LayerMap(str, Enum):
    """Which of the teacher's layers a student's layer is compared with."""

    UNIFORM = "uniform"  # the one at the same share of the depth; the last with the last
    END_ALIGNED = "end_aligned"  # the one as far from the end


class Projection(str, Enum):
    """How a student's state gets the teacher's width."""

    NONE = "none"
    SHARED = "shared"  # one linear map for all pairs
    PER_PAIR = "per_pair"


class Balance(str, Enum):
    """The weight of the hidden losses beside that of the predictions."""

    CONSTANT = "constant"
    DYNAMIC = "dynamic"  # times the quotient of both in the step before


@dataclass
class HiddenConfig:
    """Losses between hidden states.

    Attributes:
        weight: of the mean over all pairs; 0 for no such losses.
        balance: constant, or dynamic: the weight is multiplied by alpha, the divergence of the predictions by the mean
            over the pairs, both of the step before (Minitron, 2407.14679, section 3).
        loss: how far two states are apart.
        points: where they are taken: layer, embedding, or a kind of sublayer such as attention or mlp.
        map: which layers belong together.
        pairs: instead of the map, student's and teacher's layers, from 0: [[0,1],[1,3]]. A sublayer that has lost its
            other half is a layer by itself.
        projection: a linear map from the student's width to the teacher's, trained with the student.
    """

    weight: float = 0.0
    balance: Balance = Balance.CONSTANT
    loss: HiddenLoss = HiddenLoss.COSINE
    points: list[str] = field(default_factory=lambda: [LAYER])
    map: LayerMap = LayerMap.UNIFORM
    pairs: list[list[int]] | None = None
    projection: Projection = Projection.NONE

    def problems(self, where: str = "loss.hidden.") -> list[str]:
        found = at_least(where, "weight", self.weight, 0)
        if not self.points:
            found.append(f"{where}points is empty: name one of {', '.join(all_points())}")
        found += [
            f"{where}points has {point!r}: must be one of {', '.join(all_points())}"
            for point in self.points
            if point not in all_points()
        ]
        for pair in self.pairs or ():
            if len(pair) != 2:
                found.append(f"{where}pairs has {pair}: must be a student's and a teacher's layer, as in [[0,1],[1,3]]")
        for name in ("points", "pairs"):
            given = getattr(self, name) or []
            if any(given.count(one) > 1 for one in given):
                found.append(f"{where}{name} names something twice: name each once")
        if self.pairs == []:
            found.append(f"{where}pairs is empty: name pairs of layers, or set it to null for {where}map")
        return found


@dataclass
class LossConfig:
    """What the student minimises, per valid token.

    Attributes:
        kd_logits_weight: weight of the divergence from the teacher's predictions.
        lm_weight: weight of the cross-entropy against the text itself.
        lm_weight_end: lm_weight at the end of its way; null leaves it as it is.
        lm_schedule: how it gets there: constant, linear or cosine.
        lm_schedule_steps: steps of that way; null for all steps of the run.
        chunk_tokens: tokens whose logits exist at one time.
        logits: which divergence.
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
        """Whether anything is learned from a teacher."""
        return bool(self.kd_logits_weight or self.hidden.weight)

    def at(self, step: int, steps: int) -> "LossConfig":
        """The weights at a step, the first of which is 1, of a run of so many."""
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
        found = at_least(where, "chunk_tokens", self.chunk_tokens, 1)
        for name in ("kd_logits_weight", "lm_weight", "lm_weight_end"):
            found += at_least(where, name, getattr(self, name), 0)
        found += at_least(where, "lm_schedule_steps", self.lm_schedule_steps, 1)
        found += [*self.logits.problems(f"{where}logits."), *self.hidden.problems(f"{where}hidden.")]
        if not (self.kd_logits_weight or self.lm_weight or self.lm_weight_end):
            found.append(f"{where}kd_logits_weight and {where}lm_weight are both 0: raise one, or nothing is learned")
        if self.hidden.balance is Balance.DYNAMIC and self.hidden.weight and not self.kd_logits_weight:
            found.append(
                f"{where}hidden.balance = dynamic weighs against {where}kd_logits_weight, which is 0: raise it, or set "
                f"{where}hidden.balance=constant"
            )
        if (self.lm_schedule is Schedule.CONSTANT) != (self.lm_weight_end is None):
            found.append(
                f"{where}lm_schedule = {self.lm_schedule.value} and {where}lm_weight_end = {self.lm_weight_end}: set "
                f"both, lm_schedule to linear or cosine, or neither"
            )
        return found
