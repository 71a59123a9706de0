"""Losses between hidden states of a student and its teacher, each on the stage that owns the student's state.

The teacher has run over all micro-batches of a step before the student begins. Hooks keep the states that losses need,
and those whose student lives on another stage are on their way there, in a process group of their own, while the
student starts. A loss enters the backward pass where its state is made: an autograd function passes the state on and
adds the loss's gradient to the state's. So neither schedules nor the messages between stages know of it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from minitron_megatron.config.loss import HiddenConfig, HiddenLoss, LayerMap, Point, Projection
from minitron_megatron.model.build import held_sublayers
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import PROJECTIONS
from minitron_megatron.parallel.collectives import gather_objects, sum_over
from minitron_megatron.parallel.groups import Groups
from minitron_megatron.parallel.layout import Layout, layers_per_stage
from minitron_megatron.parallel.schedule import Batch, own_tokens

SHARED = "shared"


@dataclass(frozen=True)
class Pair:
    """Two states that shall become alike: of a student's transformer layer and a teacher's, which count from 0."""

    point: Point
    student: int
    teacher: int

    @property
    def source(self) -> tuple[Point, int]:
        """Where the teacher's state is."""
        return self.point, self.teacher

    @property
    def name(self) -> str:
        name = self.point.value
        return name if self.point is Point.EMBEDDING else f"{name}_{self.student}_{self.teacher}"


def resolve_pairs(config: HiddenConfig, student: Network, teacher: Network) -> list[Pair]:
    """The pairs that a configuration asks for.

    Args:
        config: which.
        student, teacher: the networks. Points that one of both layers of a pair does not have are left out.
    """
    count, of = len(student.layers), len(teacher.layers)
    if config.pairs is not None:
        layers = [tuple(pair) for pair in config.pairs]
    elif config.map is LayerMap.UNIFORM:
        ends = [(layer + 1) * of / count for layer in range(count)]
        layers = [(layer, max(round(end), 1) - 1) for layer, end in enumerate(ends)]
    else:
        shift = of - count
        layers = [(layer, layer + shift) for layer in range(count) if layer + shift >= 0]
    pairs = []
    for point in config.points:
        if point is Point.EMBEDDING:
            pairs.append(Pair(point, 0, 0))
        else:
            pairs += [
                Pair(point, own, other)
                for own, other in layers
                if point in _points(student, own) and point in _points(teacher, other)
            ]
    return pairs


def _points(network: Network, layer: int) -> list[Point]:
    """Where a transformer layer has a state."""
    return [Point.LAYER, *(Point(network.sublayers[position].name) for position in network.layers[layer])]


def hidden_problems(config: HiddenConfig, student: Network, teacher: Network) -> list[str]:
    """Why these losses cannot be between two networks, one sentence each."""
    if not config.weight:
        return []
    found = []
    networks = {"student": student, "teacher": teacher}
    for pair in config.pairs or ():
        outside = [
            f"loss.hidden.pairs has {list(pair)}, and the {role} has layers 0 to {len(network.layers) - 1}: name one of "
            f"these"
            for (role, network), layer in zip(networks.items(), pair, strict=True)
            if not 0 <= layer < len(network.layers)
        ]
        found += outside
        if not outside and not resolve_pairs(replace(config, pairs=[pair]), student, teacher):
            having = [
                ", ".join(point.value for point in _points(network, layer))
                for network, layer in zip(networks.values(), pair, strict=True)
            ]
            found.append(
                f"loss.hidden.pairs has {list(pair)}: the student's layer has the points {having[0]}, the teacher's "
                f"{having[1]}, and loss.hidden.points = {', '.join(point.value for point in config.points)} is not in "
                f"both; name other layers, or add the point layer"
            )
    if student.hidden_size != teacher.hidden_size and config.projection is Projection.NONE:
        found.append(
            f"loss.hidden.projection = none, and student.hidden_size = {student.hidden_size} is not "
            f"teacher.hidden_size = {teacher.hidden_size}: set loss.hidden.projection to shared or per_pair"
        )
    return found


def add_projections(
    chunks: Sequence[GPTModel],
    config: HiddenConfig,
    student: Network,
    teacher: Network,
    groups: Groups,
    seed: int,
) -> None:
    """Give the student the projections from its width to the teacher's, as modules that are trained with it.

    Every chunk has those of its own pairs. A shared one is on every stage that has pairs, on the first chunk that has.
    """
    if not config.weight or config.projection is Projection.NONE:
        return
    pairs = resolve_pairs(config, student, teacher)
    own = [
        {
            pair.name: n
            for n, pair in enumerate(pairs)
            if _module([chunk], student, pair.point, pair.student) is not None
        }
        for chunk in chunks
    ]
    group = None
    if config.projection is Projection.SHARED:
        first = next((number for number, names in enumerate(own) if names), None)
        own = [{SHARED: 0} if number == first else {} for number in range(len(chunks))]
        stages = sorted({_owner(pair.point, pair.student, student, groups.layout) for pair in pairs})
        group = _stages_group(stages, groups) if len(stages) > 1 else None
    for chunk, names in zip(chunks, own, strict=True):
        if names:
            projections = {
                name: _projection(student.hidden_size, teacher.hidden_size, seed + n, chunk, groups)
                for name, n in names.items()
            }
            setattr(chunk, PROJECTIONS, Projections(projections, group))


class Projections(torch.nn.ModuleDict):
    """Projections by pair, or the one that all pairs share.

    Args:
        projections: by name.
        group: the stages that have a copy each; None for this one alone.
    """

    def __init__(self, projections: dict[str, torch.nn.Module], group: dist.ProcessGroup | None):
        super().__init__(projections)
        self.group = group
        self.replica = group.rank() if group else 0
        for parameter in self.parameters():
            parameter.shared = self.replica > 0  # so that the gradient's norm counts the first stage's alone
            # As Megatron marks a table on two stages: with the distributed optimiser it then has a bucket of its own,
            # and each replica the same part of it on all stages.
            parameter.shared_embedding = group is not None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """See Megatron-Core's modules; tensor-parallel ranks and stages have copies of the same tensors."""
        found = make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)
        for tensor in found.values():
            tensor.replica_id = (self.replica, *tensor.replica_id[1:])
        return found

    def add_up(self) -> None:
        """Give the copies on all stages the sum of their gradients, which are summed over replicas. Collective."""
        if self.group:
            for parameter in self.parameters():
                dist.all_reduce(parameter.main_grad, group=self.group)


def _projection(student: int, teacher: int, seed: int, chunk: GPTModel, groups: Groups) -> torch.nn.Linear:
    """From the student's width to the teacher's, the same on every rank that has it."""
    linear = torch.nn.Linear(student, teacher, bias=False, device=groups.device, dtype=chunk.config.params_dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(teacher, student, generator=generator) * student**-0.5)
    # Its gradient is then of this rank's tokens alone, and Megatron adds it up over the tensor ranks.
    linear.weight.sequence_parallel = groups.layout.sequence
    return linear


class HiddenLosses:
    """The losses between states of a student and its teacher, over the micro-batches of one step after another.

    Args:
        config: which, and how they are weighted.
        student, teacher: this rank's chunks.
        networks: the whole student and teacher.
        groups: this rank's place.

    Attributes:
        pairs: all of them, on every rank.
    """

    def __init__(
        self,
        config: HiddenConfig,
        student: Sequence[GPTModel],
        teacher: Sequence[GPTModel],
        networks: tuple[Network, Network],
        groups: Groups,
    ):
        self.config = config
        self.groups = groups
        self.teacher_width = networks[1].hidden_size
        self.pairs = resolve_pairs(config, *networks)
        modules = ((n, _module(student, networks[0], pair.point, pair.student)) for n, pair in enumerate(self.pairs))
        self._students = {n: module for n, module in modules if module is not None}
        projections = {name: p for chunk in student for name, p in getattr(chunk, PROJECTIONS, {}).items()}
        self._projections = [projections.get(pair.name, projections.get(SHARED)) for pair in self.pairs]
        # Several pairs may look at one state of the teacher's.
        self._sources = {pair.source: _module(teacher, networks[1], *pair.source) for pair in self.pairs}
        self._dtype = teacher[0].config.params_dtype
        layout = groups.layout
        self._routes = sorted(
            {
                (*pair.source, owner, target)
                for pair in self.pairs
                if (owner := _owner(*pair.source, networks[1], layout))
                != (target := _owner(pair.point, pair.student, networks[0], layout))
            }
        )
        self._group = _stages_group(range(layout.pipeline), groups) if self._routes else None
        self._states: dict[tuple, list[Tensor | None]] = {}
        self._uses: Counter = Counter()
        # Of each micro-batch what is on its way, kept until it has arrived, and whom to ask.
        self._messages: dict[int, tuple[list[dist.P2POp], list[dist.Work]]] = {}

    @contextmanager
    def watching_teacher(self, training: bool) -> Iterator[None]:
        """While the teacher runs over the micro-batches of a step: keep its states.

        Args:
            training: whether it is trained as well.
        """
        self._states = {source: [] for source in self._sources}

        def keep(source, output):
            if torch.is_grad_enabled() != training:
                return  # a layer that is run again in the backward pass, see below
            state = _state(output).detach()
            # Without gradients Megatron-Core adds the residual stream to what a sublayer gave, in place.
            self._states[source].append(state.clone() if source[0] in (Point.ATTENTION, Point.MLP) else state)

        with ExitStack() as stack:
            for source, module in self._sources.items():
                if module is not None:
                    hook = module.register_forward_hook(lambda module, args, output, s=source: keep(s, output))
                    stack.callback(hook.remove)
            yield

    def exchange(self, batches: Sequence[Batch]) -> None:
        """Send every state to the stage of its student, one micro-batch after another. Returns at once; who needs a
        state waits for those of its micro-batch."""
        count, length = batches[0]["tokens"].shape
        if self.groups.layout.sequence:
            length //= self.groups.layout.tensor
        size, rank = (length, count, self.teacher_width), self.groups.pipeline_rank
        for number in range(len(batches)):
            operations = []
            for *source, owner, target in self._routes:
                states = self._states[tuple(source)]
                if rank == owner:
                    state, send, peer = states[number].contiguous(), dist.isend, target
                elif rank == target:
                    state, send, peer = (
                        torch.empty(size, dtype=self._dtype, device=self.groups.device),
                        dist.irecv,
                        owner,
                    )
                    states.append(state)
                else:
                    continue
                operations.append(dist.P2POp(send, state, dist.get_global_rank(self._group, peer), self._group))
            if operations:
                self._messages[number] = operations, dist.batch_isend_irecv(operations)

    @contextmanager
    def watching_student(self, batches: Sequence[Batch], weight: float, training: bool) -> Iterator[Tensor]:
        """While the student runs over the micro-batches of a step: add the losses to what is minimised.

        Args:
            batches: the step's micro-batches.
            weight: of the mean over all pairs.
            training: whether gradients are computed; else the losses are only measured.

        Yields:
            float64 `[2, pair]`: two sums over valid tokens that this rank alone found, whose quotient over all ranks is
            the pair's loss.
        """
        sums = torch.zeros(2, len(self.pairs), dtype=torch.float64, device=self.groups.device)
        masks = [own_tokens(batch["loss_mask"], self.groups) for batch in batches]
        scales: dict[int, Tensor] = {}
        calls: Counter = Counter()

        def match(n: int, output):
            # A layer that is run again in the backward pass comes with gradients then, and without at first. Backward
            # passes take the micro-batches in the order of the forward passes.
            if torch.is_grad_enabled() != training:
                return None
            if not calls and training and self.config.loss is HiddenLoss.SQUAREHEAD:
                self._receive(range(len(batches)))
                scales.update(self._scales(masks))
            number = calls[n]
            calls[n] += 1
            self._receive([number])
            target, mask = self._take(self.pairs[n].source, number), masks[number]
            projection = self._projections[n].weight if self._projections[n] is not None else None
            scale = weight / len(self.pairs) * scales.get(n, 1.0)
            error, loss = _Loss.apply(_state(output), projection, target, mask, self.config.loss, scale)
            sums[:, n] += torch.stack([error.detach(), _measure(target, mask, self.config.loss)])
            return _attach(output, loss) if training else None

        self._uses = Counter((self.pairs[n].source, number) for n in self._students for number in range(len(batches)))
        with ExitStack() as stack:
            for n, module in self._students.items():
                hook = module.register_forward_hook(lambda module, args, output, n=n: match(n, output))
                stack.callback(hook.remove)
            yield sums
        self._receive(range(len(batches)))
        if not self.groups.layout.sequence and self.groups.tensor_rank > 0:
            sums.zero_()  # every tensor rank has found the same
        self._states = {}

    def _receive(self, numbers: Sequence[int]) -> None:
        """Wait for the states of some micro-batches, and let go of those that nobody needs here any longer."""
        for number in numbers:
            _, messages = self._messages.pop(number, ([], []))
            for message in messages:
                message.wait()
            for source, states in self._states.items():
                if states and not self._uses[source, number]:
                    states[number] = None

    def _take(self, source: tuple, number: int) -> Tensor:
        """The teacher's state of a micro-batch, which is let go of with its last use."""
        state = self._states[source][number]
        self._uses[source, number] -= 1
        if not self._uses[source, number]:
            self._states[source][number] = None
        return state

    def _scales(self, masks: list[Tensor]) -> dict[int, Tensor]:
        """For each pair of this stage, the step's tokens by the sum of the teacher's mean squares, over all ranks that
        hold tokens: with it, the mean over tokens is the quotient of the sums (2310.06927, section 3.1)."""
        both = torch.zeros(2, len(self._students), dtype=torch.float64, device=self.groups.device)
        for column, n in enumerate(self._students):
            for target, mask in zip(self._states[self.pairs[n].source], masks, strict=True):
                both[:, column] += torch.stack([mask.sum(), _measure(target, mask, HiddenLoss.SQUAREHEAD)])
        if self.groups.layout.sequence:
            sum_over(both, self.groups.collection.tp)
        sum_over(both, self.groups.collection.dp)
        tokens, squares = both
        return dict(zip(self._students, (tokens / squares.clamp(min=1e-30)).float(), strict=True))


def _measure(target: Tensor, mask: Tensor, kind: HiddenLoss) -> Tensor:
    """What the errors of a micro-batch are divided by, in sum: tokens, or the mean squares of the teacher's states."""
    if kind is HiddenLoss.SQUAREHEAD:
        return (_wide(target).square().mean(-1) * mask).sum()
    return mask.sum()


def _wide(states: Tensor) -> Tensor:
    """States in the number format of losses, float32 at least."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _errors(state: Tensor, target: Tensor, kind: HiddenLoss) -> Tensor:
    """How far apart two states are, `[seq, batch]`."""
    if kind is HiddenLoss.COSINE:
        return 1 - F.cosine_similarity(state, target, dim=-1)
    return (state - target).square().mean(-1)


class _Loss(torch.autograd.Function):
    """Error of a projected state, summed over valid tokens, as it is and scaled; the gradient is that of the latter.

    It is computed at once, so that until the backward pass there is one more tensor in the number format of the states,
    and not the float32 ones that lead to the loss. A projection's gradient goes to Megatron's `main_grad` in float32.
    """

    @staticmethod
    def forward(ctx, state, projection, target, mask, kind, scale):
        projected = state.detach() if projection is None else F.linear(state.detach(), projection.detach())
        if not state.requires_grad:
            error = (_errors(_wide(projected), _wide(target), kind) * mask).sum()
            return error, scale * error
        with torch.enable_grad():
            leaf = _wide(projected).requires_grad_()
            error = (_errors(leaf, _wide(target), kind) * mask).sum()
            grad = torch.autograd.grad(scale * error, leaf)[0].to(projected.dtype)
        ctx.projection = projection
        ctx.save_for_backward(grad, *([] if projection is None else [state]))
        error = error.detach()
        ctx.mark_non_differentiable(error)
        return error, scale * error

    @staticmethod
    def backward(ctx, _, grad_loss):
        grad, *state = ctx.saved_tensors
        grad = grad * grad_loss.to(grad.dtype)
        weight = ctx.projection
        if weight is None:
            return grad, *[None] * 5
        share = grad.flatten(0, 1).T @ state[0].flatten(0, 1)
        if hasattr(weight, "main_grad"):
            weight.main_grad += share
            weight.grad_added_to_main_grad = True  # Megatron's protocol: its hook must fire, and add nothing
        return grad @ weight, share, *[None] * 4


class _Attach(torch.autograd.Function):
    """A state, unchanged; the backward pass also begins at a loss."""

    @staticmethod
    def forward(ctx, state, loss):
        ctx.like = loss
        return state

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones_like(ctx.like)


def _attach(output, loss: Tensor):
    """A module's output, whose first tensor takes a loss with it into the backward pass."""
    state, *others = output if isinstance(output, tuple) else (output,)
    state = make_viewless_tensor(_Attach.apply(state, loss), requires_grad=True, keep_graph=True)
    return (state, *others) if isinstance(output, tuple) else state


def _state(output) -> Tensor:
    """The hidden state in a module's output: an attention or an MLP gives its bias beside."""
    state, bias = output if isinstance(output, tuple) else (output, None)
    return state if bias is None else state + bias


def _module(chunks: Sequence[torch.nn.Module], network: Network, point: Point, layer: int) -> torch.nn.Module | None:
    """The module whose output a state is, if this rank has it."""
    for chunk in chunks:
        if point is Point.EMBEDDING and chunk.pre_process:
            return chunk.embedding
        for positions, own in held_sublayers(chunk, network) if point is not Point.EMBEDDING else ():
            if point is Point.LAYER and positions[-1] == network.layers[layer][-1]:
                return own
            for position in positions:
                sublayer = network.sublayers[position]
                if sublayer.name == point.value and network.layer_of(position) == layer:
                    return getattr(own, sublayer.slot.module)
    return None


def _owner(point: Point, layer: int, network: Network, layout: Layout) -> int:
    """The pipeline rank that has a state."""
    if point is Point.EMBEDDING:
        return 0
    ends = accumulate(layers_per_stage(len(network.layers), layout.stages))
    return next(stage for stage, end in enumerate(ends) if layer < end) % layout.pipeline


def _stages_group(stages: Sequence[int], groups: Groups) -> dist.ProcessGroup | None:
    """The given stages of this rank's pipeline as a group of their own, whose messages do not mix with those of the
    schedules; None on other stages. Collective on the world."""
    pipeline = dist.get_process_group_ranks(groups.collection.pp)
    own, found = [pipeline[stage] for stage in stages], None
    for ranks in sorted(set(map(tuple, gather_objects(own, dist.group.WORLD)))):
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            found = group
    if found:
        # NCCL connects a group with its first operation, in which all of its ranks have to take part.
        dist.all_reduce(torch.zeros(1, device=groups.device), group=found)
    return found
