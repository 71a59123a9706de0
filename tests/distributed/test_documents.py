"""Documents that share a row are computed as each alone is, whatever the layout: losses, gradients, depth scores."""

import numpy as np
import torch
import torch.distributed as dist

from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor
from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.schema import (
    DepthConfig,
    DepthCriterion,
    DepthSearch,
    DType,
    OptimizerConfig,
    ParallelConfig,
    ScoreConfig,
    TargetConfig,
)
from minitron_megatron.data.samples import rank_batches
from tests.gradients import Gradients, close, local_gradients
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model

SEQUENCE, MICRO_BATCH, VOCAB = 16, 2, LLAMA["vocab_size"]
ROWS = [[16], [5, 4, 7], [1, 9, 6], [3] * 5 + [1], [8, 8], [15, 1], [2, 14], [7, 3, 6]]
LAYOUTS = {
    "alone": ParallelConfig(),
    "1x1": ParallelConfig(),
    "tp2_pp2_sequence": ParallelConfig(tensor=2, pipeline=2, sequence=True),
}
ON_TEXT = [DepthCriterion.LOSS, DepthCriterion.KL, DepthCriterion.BLOCK_INFLUENCE]


def sample(documents):
    """A row of whole documents, as `minitron_megatron.data.samples` makes it."""
    lengths = [len(document) for document in documents]
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens = torch.cat(documents)
    labels = tokens.roll(-1)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (ids == torch.cat([ids[1:], torch.tensor([-1])])).float(),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "document_ids": ids,
    }


def documents():
    generator = torch.Generator().manual_seed(4)
    return [[torch.randint(0, VOCAB, (length,), generator=generator) for length in row] for row in ROWS]


def packed():
    return [sample(row) for row in documents()]


def alone():
    """The same, a row for each, filled up with tokens that count nothing, and without numbers of documents."""
    found = []
    for document in (document for row in documents() for document in row):
        filled = sample([document, torch.full((SEQUENCE - len(document),), 7)])
        filled["loss_mask"][len(document) - 1 :] = 0
        filled["position_ids"] = torch.arange(SEQUENCE)
        del filled["document_ids"]
        found.append(filled)
    return found


def work(folder, name: str):
    from minitron_megatron.distillation.entries import loss_entries
    from minitron_megatron.distillation.live_teacher import LiveTeacher
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.pruning.score_model import score_model
    from minitron_megatron.training.optimizer import setup_optimizer
    from tests.unit.pruning.direct import build_ours

    samples = alone() if name == "alone" else packed()
    with parallel_context(LAYOUTS[name]) as ctx:
        teacher_chunks, network = build_ours(hf_model(seed=1, **LLAMA), ctx)
        scoring = ScoreConfig(
            num_samples=len(samples),
            micro_batch=MICRO_BATCH,
            depth=DepthConfig(criteria=ON_TEXT, search=DepthSearch.GREEDY),
            target=TargetConfig(layers=2),
        )
        scores = score_model(teacher_chunks, network, ctx, samples, scoring)
        model_chunks, network = build_ours(hf_model(seed=2, **LLAMA), ctx, recompute=ctx.layout.sequence)
        for chunk in teacher_chunks:
            chunk.requires_grad_(False)
        trained = setup_optimizer(model_chunks, OptimizerConfig(lr=1e-3, warmup_steps=1), 4, DType.FP32, ctx)
        entries = loss_entries(LossConfig(0.7, 0.4), LiveTeacher(teacher_chunks, ctx, network.vocab_size))
        step = DistillationStep(trained.model_chunks, entries, ctx, network.vocab_size, chunk_tokens=7)
        trained.zero_grad()
        result = step.train(list(rank_batches(samples, 0, len(samples), MICRO_BATCH, 0, 1)))
        found = {
            "losses": (result.losses["kd_logits"], result.losses["lm"], result.num_tokens),
            "depth": scores.depth,
            "gradients": local_gradients(model_chunks, network, ctx),
            "network": network,
        }
        torch.save(found, folder / f"{name}_{dist.get_rank()}.pt")


def test_documents_of_a_row_do_not_see_each_other(tmp_path):
    found = {}
    for name, layout in LAYOUTS.items():
        ranks = layout.tensor * layout.pipeline
        run_on_ranks(ranks, work, tmp_path, name)
        found[name] = [torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=False) for rank in range(ranks)]
    [expected] = found.pop("alone")
    network = expected["network"]
    assert expected["losses"][2] == sum(length - 1 for row in ROWS for length in row)
    whole = Gradients(network, [expected["gradients"]])
    for name, ranks in found.items():
        for rank in ranks:
            np.testing.assert_allclose(rank["losses"], expected["losses"], rtol=1e-5)
            for criterion, values in expected["depth"].items():
                np.testing.assert_allclose(rank["depth"][criterion], values, rtol=1e-4, err_msg=f"{name} {criterion}")
        gradients = Gradients(network, [rank["gradients"] for rank in ranks])
        for key, _, param, part in hf_tensors(network):
            assert close(read_hf_tensor(gradients, param, part), read_hf_tensor(whole, param, part)), f"{name} {key}"
