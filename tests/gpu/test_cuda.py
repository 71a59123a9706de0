"""On a GPU, over NCCL: the same numbers as from transformers, torch and the CPU, in the memory that is promised."""

import pytest
import torch

from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.loss import Divergence, LogitsConfig, LossConfig
from minitron_megatron.config.schema import DType, OptimizerConfig
from minitron_megatron.data.samples import rank_batches
from minitron_megatron.distillation.entries import loss_entries
from minitron_megatron.distillation.linear_losses import Predictions, linear_distillation_loss
from minitron_megatron.distillation.live_teacher import LiveTeacher
from minitron_megatron.distillation.losses import distillation_loss
from minitron_megatron.distillation.step import DistillationStep
from minitron_megatron.model.build import build_model, fp8_problems
from minitron_megatron.model.families import network_from_config
from minitron_megatron.parallel.schedule import output_weight, run_forward, to_device
from minitron_megatron.pruning.score_model import score_model
from minitron_megatron.training.optimizer import setup_optimizer
from tests.gradients import Gradients, close, local_gradients
from tests.in_memory import StateDict
from tests.rounding import assert_as_precise, of_operations
from tests.tiny import FAMILIES, Samples, hf_model
from tests.unit.distillation.cases import TOKENS, VOCAB, Case
from tests.unit.pruning.direct import build_ours, samples_for, score_config

SEQUENCE, BATCH = 16, 4


def on_gpu(batch):
    [batch] = to_device([batch], torch.device("cuda"))
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(ctx, family):
    theirs = hf_model(**FAMILIES[family])
    model_chunks, network = build_ours(theirs, ctx)
    [batch] = rank_batches(Samples(BATCH, SEQUENCE, network.vocab_size), 0, BATCH, BATCH, 0, 1)
    [hidden] = run_forward(model_chunks, [on_gpu(batch)], ctx, on_output=lambda output, batch: output)
    assert hidden.is_cuda
    logits = (hidden @ output_weight(model_chunks[0]).T)[..., : network.vocab_size].transpose(0, 1).cpu()
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(batch["tokens"]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_autograd_on_transformers_models(ctx, family, frugal):
    """With activations recomputed, a distributed optimiser and overlapped communication, as in the recipes, or none."""
    teacher, student = hf_model(seed=1, **FAMILIES[family]), hf_model(seed=2, **FAMILIES[family])
    teacher_chunks, _ = build_ours(teacher, ctx)
    model_chunks, network = build_ours(student, ctx, recompute=frugal)
    for chunk in teacher_chunks:
        chunk.requires_grad_(False)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=1, distributed=frugal, overlap=frugal)
    trained = setup_optimizer(model_chunks, optimizer, 4, DType.FP32, ctx)
    entries = loss_entries(LossConfig(0.7, 0.4), LiveTeacher(teacher_chunks, ctx, network.vocab_size))
    step = DistillationStep(trained.model_chunks, entries, ctx, network.vocab_size, chunk_tokens=7)
    [batch] = rank_batches(Samples(BATCH, SEQUENCE, network.vocab_size), 0, BATCH, BATCH, 0, 1)
    trained.zero_grad()
    result = step.train([on_gpu(batch)])
    found = Gradients(network, [local_gradients(model_chunks, network, ctx)])

    with torch.no_grad():
        target = teacher(batch["tokens"]).logits.flatten(0, 1)
    logits = student(batch["tokens"]).logits.flatten(0, 1)
    labels, mask = batch["labels"].flatten(), batch["loss_mask"].flatten()
    loss = distillation_loss(logits, labels, mask, target, 0.7, 0.4) / mask.sum()
    loss.backward()
    assert 0.7 * result.losses["kd_logits"] + 0.4 * result.losses["lm"] == pytest.approx(loss.item(), rel=1e-4)
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    for name, _, param, part in hf_tensors(network):
        assert close(read_hf_tensor(found, param, part), expected[name], 1e-3), name
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert trained.grad_norm() == pytest.approx(norm, rel=1e-3)
    trained.step()
    assert step.train([on_gpu(batch)]).total < result.total


def test_a_teacher_in_fp8_says_nearly_the_same(ctx):
    config = {**FAMILIES["llama"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    theirs = hf_model(**config)
    network = network_from_config(config)
    if fp8_problems(network, ctx.layout, "teacher_fp8"):
        pytest.skip("no Transformer Engine here")
    [batch] = rank_batches(Samples(BATCH, SEQUENCE, network.vocab_size), 0, BATCH, BATCH, 0, 1)
    states = []
    for fp8 in (False, True):
        model_chunks = build_model(network, ctx, DType.BF16, fp8=fp8)
        load_weights(model_chunks, StateDict(network, theirs.state_dict()), ctx)
        states += run_forward(model_chunks, [on_gpu(batch)], ctx, on_output=lambda output, batch: output.float())
    difference = (states[1] - states[0]).norm() / states[0].norm()
    assert 1e-4 < difference < 0.1  # in FP8 indeed, whose e4m3 has 3 bits of mantissa


def test_scores_are_those_of_hooks_on_a_transformers_model(ctx):
    theirs = hf_model(**FAMILIES["llama"])
    model_chunks, network = build_ours(theirs, ctx)
    samples = samples_for(theirs)
    scores = score_model(model_chunks, network, ctx, samples, score_config())
    seen = {}
    for number, layer in enumerate(theirs.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, n=number: seen.update({n: args[0]}))
    with torch.no_grad():
        theirs(samples.tokens[:, :-1])
    for number, of_layer in seen.items():
        # Mean of absolute values over a sequence's valid tokens, L2 over sequences.
        of_sequences = [x[keep].abs().mean(0) for x, keep in zip(of_layer, samples.mask > 0) if keep.any()]
        expected = torch.stack(of_sequences).norm(dim=0)
        torch.testing.assert_close(scores.elements["ffn"][number].float(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", list(Divergence))
def test_losses_are_those_of_whole_logits(ctx, divergence, dtype):
    case = Case(dtype=torch.float64, config=LogitsConfig(divergence=divergence))
    teacher = case.teacher
    # What the number format makes of the inputs is no fault of the loss.
    inputs = [x.to(dtype) for x in (case.hidden, case.weight, teacher.hidden, teacher.weight)]
    case.hidden, case.weight, *of_teacher = (x.double() for x in inputs)
    case.teacher = Predictions(*of_teacher)
    expected = case.plain(0.7, 0.4)
    case.hidden, case.weight, *of_teacher = inputs
    case.teacher = Predictions(*of_teacher)
    plain, loss_error = case.in_its_formats(0.7, 0.4), case.loss_error(0.7, 0.4)
    case.hidden, case.weight, *of_teacher = (x.cuda() for x in inputs)
    case.teacher = Predictions(*of_teacher)
    case.labels, case.mask = case.labels.cuda(), case.mask.cuda()
    found = case.linear(ctx.collection.tp, 0.7, 0.4, 5)
    if dtype is torch.bfloat16:
        assert found[0] == pytest.approx(expected[0], rel=0, abs=loss_error)
        for own, other, exact in zip(found[1:3], plain[1:], expected[1:], strict=True):
            assert_as_precise(own.cpu(), other, exact, dtype)
    else:  # the softmaxes have the format of the products, and a gradient is a sum over tokens or the vocabulary
        error = of_operations(TOKENS * VOCAB, dtype)
        assert found[0] == pytest.approx(expected[0], rel=error)
        assert close(found[1].double().cpu(), expected[1], error)
        assert close(found[2].double().cpu(), expected[2], error)


def test_the_losses_memory_does_not_grow_with_the_tokens(ctx):
    """At 8,192 tokens the logits of one model alone would take 4 GiB in float32."""
    vocab, width, peaks = 131_072, 256, []
    for tokens in (2048, 8192):
        hidden, teacher_hidden = (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weight, teacher_weight = (torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        hidden.requires_grad_(), weight.requires_grad_()
        labels, mask = torch.zeros(tokens, dtype=torch.long, device="cuda"), torch.ones(tokens, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        teacher = Predictions(teacher_hidden, teacher_weight)
        loss, _ = linear_distillation_loss(hidden, weight, labels, mask, ctx.collection.tp, vocab, teacher, 1.0, 0.0)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del hidden, weight, loss
    assert peaks[1] < 1.1 * peaks[0] < 2**31
