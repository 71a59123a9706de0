"""Captures a teacher's hidden states, and sends each to the pipeline rank that wants it.

States are sent point to point, in a process group of their own, while the student starts, independently of the
schedules and their messages.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from minitron_megatron.config.loss import EMBEDDING, LAYER
from minitron_megatron.distillation.pairs import Tap
from minitron_megatron.distillation.taps import ModuleOutput, module_at, stages_group, state_of
from minitron_megatron.parallel.collectives import gather_objects
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import Batch


class StateExchange:
    """Exchanges the hidden states of each step. Collective.

    Args:
        model_chunks: this rank's teacher, without Megatron's wrappers.
        wanted: states with the pipeline rank that wants each, repeated for every use there.
        ctx: this rank's place.
    """

    def __init__(self, model_chunks: Sequence[GPTModel], wanted: Sequence[tuple[Tap, int]], ctx: ParallelContext):
        config, layout = model_chunks[0].config, ctx.layout
        self.ctx = ctx
        # A state may be wanted several times.
        self._modules = {tap: module_at(model_chunks, tap) for tap, _ in wanted}
        self._width, self._dtype = config.hidden_size, config.pipeline_dtype or config.params_dtype
        held = gather_objects([tap for tap, module in self._modules.items() if module], ctx.collection.pp)
        owners = {tap: rank for rank, taps in enumerate(held) for tap in taps}
        self._routes = sorted({(tap, owners[tap], target) for tap, target in wanted if owners[tap] != target})
        self._group = stages_group(range(layout.pipeline), ctx) if self._routes else None
        self._global_ranks = dist.get_process_group_ranks(ctx.collection.pp)
        self._wanted_here = Counter(tap for tap, target in wanted if target == ctx.pipeline_rank)
        # By tap and number of the micro-batch, until nobody on this rank wants it any more.
        self._states: dict[Tap, dict[int, Tensor]] = {}
        self._uses: Counter[tuple[Tap, int]] = Counter()
        # By micro-batch, operations in flight, whose tensors must be kept until they are done, and their handles.
        self._messages: dict[int, tuple[list[dist.P2POp], list[dist.Work]]] = {}

    @contextmanager
    def capturing(self, training: bool) -> Iterator[None]:
        """Captures the states of every micro-batch that the teacher runs over inside the block.

        Args:
            training: whether the teacher is trained in these runs.
        """
        self._states = {tap: {} for tap in self._modules}

        def keep(tap: Tap, output: ModuleOutput) -> None:
            if torch.is_grad_enabled() != training:
                return  # the other run of a recomputed layer
            states, state = self._states[tap], state_of(output).detach()
            # Without gradients Megatron-Core adds the residual stream to a sublayer's output in place.
            states[len(states)] = state if tap[0] in (LAYER, EMBEDDING) else state.clone()

        with ExitStack() as stack:
            for tap, module in self._modules.items():
                if module is not None:
                    hook = module.register_forward_hook(lambda module, args, output, tap=tap: keep(tap, output))
                    stack.callback(hook.remove)
            yield

    def send(self, batches: Sequence[Batch]) -> None:
        """Starts to send every state to where it is wanted, one micro-batch after another, without waiting."""
        count, length = batches[0]["tokens"].shape
        if self.ctx.layout.sequence:
            length //= self.ctx.layout.tensor
        size, rank = (length, count, self._width), self.ctx.pipeline_rank
        for number in range(len(batches)):
            self._uses.update({(tap, number): uses for tap, uses in self._wanted_here.items()})
            operations = []
            for tap, owner, target in self._routes:
                if rank == owner:
                    operations.append(self._operation(dist.isend, self._states[tap][number].contiguous(), target))
                elif rank == target:
                    state = torch.empty(size, dtype=self._dtype, device=self.ctx.device)
                    operations.append(self._operation(dist.irecv, state, owner))
                    self._states[tap][number] = state
            if operations:
                self._messages[number] = operations, dist.batch_isend_irecv(operations)

    def _operation(self, send_or_receive: Callable[..., dist.Work | None], state: Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(send_or_receive, state, self._global_ranks[stage], self._group)

    def state(self, tap: Tap, number: int) -> Tensor:
        """Waits for a state of a micro-batch and returns it."""
        self._receive(number)
        return self._states[tap][number]

    def release(self, tap: Tap, number: int) -> None:
        """Frees a state when all that want it on this rank have released it."""
        self._uses[tap, number] -= 1
        if not self._uses[tap, number]:
            del self._states[tap][number]

    def finish(self) -> None:
        """Waits for all operations in flight, and frees all states."""
        for number in list(self._messages):
            self._receive(number)
        self._states, self._uses = {}, Counter()

    def _receive(self, number: int) -> None:
        """Waits for the states of a micro-batch, and frees those that nobody wants on this rank."""
        _, messages = self._messages.pop(number, ([], []))
        for message in messages:
            message.wait()
        for tap, states in self._states.items():
            if not self._uses[tap, number]:
                states.pop(number, None)
