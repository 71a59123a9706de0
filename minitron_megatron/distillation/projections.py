"""Linear projections from a student's hidden size to its teacher's, trained with the student."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import unwrap_model

from minitron_megatron.config.loss import HiddenConfig, Projection
from minitron_megatron.distillation.pairs import Pair, resolve_pairs
from minitron_megatron.distillation.taps import module_at, pipeline_rank_of, stages_group
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import PROJECTIONS
from minitron_megatron.parallel.context import ParallelContext

_SHARED = "shared"


def add_projections(
    model_chunks: Sequence[GPTModel],
    config: HiddenConfig,
    student: Network,
    teacher: Network,
    ctx: ParallelContext,
    seed: int,
) -> None:
    """Adds projections to the teacher's hidden size to the student, as modules that are trained with it. Collective.

    Every model chunk has those of its own pairs. A shared projection is on every stage with pairs, in its first model
    chunk with pairs.

    Args:
        model_chunks: this rank's student.
        config: which pairs, and which projections; none for `Projection.NONE` or a weight of 0.
        student, teacher: the whole networks.
        ctx: this rank's place.
        seed: of the random weights.
    """
    if not config.weight or config.projection is Projection.NONE:
        return
    pairs = resolve_pairs(config, student, teacher)
    own = [
        {pair.name: n for n, pair in enumerate(pairs) if module_at([chunk], pair.student_tap) is not None}
        for chunk in model_chunks
    ]
    group = None
    if config.projection is Projection.SHARED:
        first = next((number for number, names in enumerate(own) if names), None)
        own = [{_SHARED: 0} if number == first else {} for number in range(len(model_chunks))]
        num_layers = len(student.layers)
        stages = sorted({pipeline_rank_of(pair.student_tap, num_layers, ctx.layout) for pair in pairs})
        group = stages_group(stages, ctx) if len(stages) > 1 else None
    for chunk, names in zip(model_chunks, own, strict=True):
        if names:
            projections = {
                name: _projection(student.hidden_size, teacher.hidden_size, seed + n, chunk, ctx)
                for name, n in names.items()
            }
            setattr(chunk, PROJECTIONS, Projections(projections, group))


def projections_of(model_chunks: Sequence[GPTModel], pairs: Sequence[Pair]) -> list[torch.nn.Linear | None]:
    """Returns the projection of each pair; None if this rank has none for it."""
    own = {name: p for chunk in model_chunks for name, p in getattr(chunk, PROJECTIONS, {}).items()}
    return [own.get(pair.name, own.get(_SHARED)) for pair in pairs]


def add_up_copies(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Sums the gradients of projections that several stages share, after Megatron's sum over replicas. Collective."""
    for chunk in unwrap_model(list(model_chunks)):
        if hasattr(chunk, PROJECTIONS):
            getattr(chunk, PROJECTIONS).add_up()


class Projections(torch.nn.ModuleDict):
    """Projections by pair, or one that all pairs share.

    Args:
        projections: by name.
        group: the stages with a copy; None for only this one.
    """

    def __init__(self, projections: Mapping[str, torch.nn.Linear], group: dist.ProcessGroup | None):
        super().__init__(projections)
        self.group = group
        self.replica = group.rank() if group else 0
        for parameter in self.parameters():
            # Megatron's marks. The gradient's norm counts the first stage's copy alone:
            parameter.shared = self.replica > 0  # type: ignore[attr-defined]
            # As on a tied embedding: the distributed optimiser gives the parameter a bucket of its own, and each
            # replica the same part of it on all stages.
            parameter.shared_embedding = group is not None  # type: ignore[attr-defined]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """See Megatron-Core's modules; tensor-parallel ranks and stages have copies of the same tensors."""
        tensors = make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)
        for tensor in tensors.values():
            tensor.replica_id = (self.replica, *tensor.replica_id[1:])
        return tensors

    def add_up(self) -> None:
        """Sums the gradients of the copies on all stages, after the sum over replicas. Collective."""
        if self.group:
            for parameter in self.parameters():
                dist.all_reduce(parameter.main_grad, group=self.group)  # type: ignore[attr-defined]  # Megatron's


def _projection(student: int, teacher: int, seed: int, chunk: GPTModel, ctx: ParallelContext) -> torch.nn.Linear:
    """Makes a projection from the student's hidden size to the teacher's, the same on every rank that has it."""
    linear = torch.nn.Linear(student, teacher, bias=False, device=ctx.device, dtype=chunk.config.params_dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(teacher, student, generator=generator) * student**-0.5)
    # Each rank's gradient is then of its own tokens, and Megatron sums it over the tensor ranks.
    linear.weight.sequence_parallel = ctx.layout.sequence  # type: ignore[attr-defined]  # Megatron's mark
    return linear
