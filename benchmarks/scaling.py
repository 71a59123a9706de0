"""Layouts on the cores of one machine: tokens per second, and the bytes that each rank sends a step.

One step of distillation, of a network that two and four tensor ranks divide, by 1, 2 and 4 ranks of data, tensor and
pipeline parallelism, the same tokens in each. More ranks than cores cannot be faster; what the table shows is what
splitting costs, and that the messages are those that a formula expects.
"""

import os
import time
import warnings
from multiprocessing import get_context

from common import (
    console,
    describe,
    machine,
    markdown_table,
    parser,
    print_table,
    show_spread,
    spread,
    write_docs,
    write_results,
)

NAME = "scaling"
LAYOUTS = [("", 1), *((axis, ranks) for axis in ("data", "tensor", "pipeline") for ranks in (2, 4))]
MICRO_BATCHES, MICRO_BATCH, LENGTH, VOCAB = 4, 2, 256, 32_768
TEACHER = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
STUDENT = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
TOKENS = MICRO_BATCHES * MICRO_BATCH * LENGTH
COLUMNS = ["layout", "ranks", "tokens/s", "of one rank's", "MB a step, measured", "MB, by formula"]


def main() -> None:
    options = parser(__doc__, repeats=3)
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts, cases = machine(), []
    for axis, ranks in LAYOUTS:
        seconds, megabytes, expected = run_on(ranks, axis, args.repeats)
        rate = spread([TOKENS / s for s in seconds])
        cases.append({"axis": axis, "ranks": ranks, "rate": rate, "mb": megabytes, "expected_mb": expected})
        console.print(*row(cases[-1], cases[0]), sep="  ")
    results = {"machine": facts, "settings": {"repeats": args.repeats}, "cases": cases}
    write_results(NAME, results)
    print_table(f"{TOKENS} tokens a step", COLUMNS, [row(case, cases[0]) for case in cases])
    console.print(describe(facts))
    for case in cases:
        assert abs(case["mb"] - case["expected_mb"]) <= 0.02 * case["expected_mb"] + 0.2, case


def run_on(ranks: int, axis: str, repeats: int) -> tuple[list[float], float, float]:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with get_context("spawn").Pool(ranks) as pool:
        work = [(rank, ranks, store.port, axis, repeats) for rank in range(ranks)]
        found = pool.starmap(measure, work, chunksize=1)
    seconds = [max(of_repeat) for of_repeat in zip(*(seconds for seconds, *_ in found), strict=True)]
    return seconds, max(mb for _, mb, _ in found), max(mb for *_, mb in found)


def networks():
    from minitron_megatron.model.families import network_from_config

    common = {
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    return [network_from_config({**common, **sizes}) for sizes in (TEACHER, STUDENT)]


def measure(rank: int, ranks: int, port: int, axis: str, repeats: int) -> tuple[list[float], float, float]:
    """Seconds of each repeat but a first one that is not counted, and megabytes that this rank sent a step: counted,
    and by `expected_bytes`."""
    warnings.simplefilter("ignore")
    import torch

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))

    from minitron_megatron.config.loss import LossConfig
    from minitron_megatron.config.schema import DType, OptimizerConfig, ParallelConfig
    from minitron_megatron.distillation.entries import loss_entries
    from minitron_megatron.distillation.live_teacher import LiveTeacher
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.training.optimizer import setup_optimizer

    teacher_shape, student_shape = networks()
    with parallel_context(ParallelConfig(**{axis: ranks} if axis else {})) as ctx:
        teacher = build_model(teacher_shape, ctx, DType.BF16)
        for chunk in teacher:
            chunk.requires_grad_(False)
        student = build_model(student_shape, ctx, DType.BF16)
        trained = setup_optimizer(student, OptimizerConfig(), 100, DType.BF16, ctx)
        step = DistillationStep(
            trained.model_chunks, loss_entries(LossConfig(), LiveTeacher(teacher, ctx, VOCAB)), ctx, VOCAB
        )
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCAB, (MICRO_BATCHES, MICRO_BATCH, LENGTH + 1), generator=generator)
        own = tokens[ctx.data_rank :: ctx.layout.replicas]
        batches = [
            {
                "tokens": batch[:, :-1].contiguous(),
                "labels": batch[:, 1:].contiguous(),
                "loss_mask": torch.ones(MICRO_BATCH, LENGTH),
                "position_ids": torch.arange(LENGTH).repeat(MICRO_BATCH, 1),
            }
            for batch in own
        ]
        seconds, sent = [], Sent()
        for number in range(1 + repeats):
            with sent if number == repeats else Nothing():
                started = time.perf_counter()
                trained.zero_grad()
                step.train(batches)
                trained.step()
                if ranks > 1:
                    torch.distributed.barrier()
                seconds.append(time.perf_counter() - started)
        expected = expected_bytes(teacher_shape, student_shape, ctx.layout, ctx)
        return seconds[1:], sent.bytes / 1e6, expected / 1e6


class Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class Sent:
    """Counts the bytes of tensors that this rank gives to `torch.distributed`, while it is entered."""

    COLLECTIVES = ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")

    def __init__(self):
        self.bytes = 0

    def __enter__(self):
        import torch.distributed as dist

        self.plain = {name: getattr(dist, name) for name in (*self.COLLECTIVES, "batch_isend_irecv")}
        for name in self.COLLECTIVES:
            setattr(dist, name, self.counting(self.plain[name]))

        def batch_isend_irecv(operations):
            for operation in operations:
                if operation.op is dist.isend:
                    self.add(operation.tensor)
            return self.plain["batch_isend_irecv"](operations)

        dist.batch_isend_irecv = batch_isend_irecv
        return self

    def __exit__(self, *exception):
        import torch.distributed as dist

        for name, function in self.plain.items():
            setattr(dist, name, function)

    def counting(self, function):
        def counted(tensor, *args, **options):
            group = options.get("group")
            if group is None or group.size() > 1:
                self.add(tensor)
            return function(tensor, *args, **options)

        return counted

    def add(self, tensor) -> None:
        self.bytes += tensor.numel() * tensor.element_size()


def expected_bytes(teacher, student, layout, ctx) -> float:
    """Bytes of a step that a rank gives away; a collective counts what goes in.

    - data: every gradient in float32.
    - tensor: bf16 states, two all-reduces per layer forward (behind attention and MLP) and, of the student, two
      backward; one behind each embedding; one for the gradient of the student's last states; and float32 statistics of
      the softmaxes: of each model a maximum and a sum per token, the divergence and the label's logit.
    - pipeline: bf16 states of both models to the next stage, gradients of the student's to the one before; the gradient
      of a tied table, which the first and the last stage both have.
    """
    from minitron_megatron.model.count import num_parameters

    tokens, state = TOKENS / layout.replicas, 2
    if layout.replicas > 1:
        return 4 * num_parameters(student)
    if layout.tensor > 1:
        layers = tokens * state * (2 * teacher.num_layers * teacher.hidden + 4 * student.num_layers * student.hidden)
        ends = tokens * state * (teacher.hidden + 2 * student.hidden)
        return layers + ends + 4 * tokens * 6
    if layout.pipeline > 1:
        onwards = 0 if ctx.is_last_stage else tokens * state * (teacher.hidden + student.hidden)
        back = 0 if ctx.is_first_stage else tokens * state * student.hidden
        table = 4 * student.padded_vocab * student.hidden if ctx.is_first_stage or ctx.is_last_stage else 0
        return onwards + back + table
    return 0.0


def row(case: dict, single: dict) -> list[str]:
    return [
        case["axis"] or "one rank",
        str(case["ranks"]),
        show_spread(case["rate"], 0),
        f"{case['rate']['median'] / single['rate']['median']:.2f}",
        f"{case['mb']:.2f}",
        f"{case['expected_mb']:.2f}",
    ]


def in_markdown(results: dict) -> str:
    cases = results["cases"]
    table = markdown_table(COLUMNS, [row(case, cases[0]) for case in cases])
    return "\n\n".join([table, describe(results["machine"])])


if __name__ == "__main__":
    main()
