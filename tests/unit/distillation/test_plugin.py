"""The loop of the documentation, with models and an optimiser that know nothing of this project."""

import io
import itertools
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from minitron_megatron import DistillationStep, LiveTeacher, LossConfig, current_context, loss_entries, network_of
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.loss import HiddenConfig, LogitsConfig
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.parallel.context import parallel_context
from tests.ranks import run_on_ranks
from tests.tiny import Samples

VOCAB, SEQUENCE, MICRO_BATCH, STEPS, NUM_MICROBATCHES = 101, 16, 2, 3, 2
DOCUMENTATION = Path(__file__).parents[3] / "docs/distillation.md"


def own_model(hidden, layers, first=True, last=True, vocab=VOCAB, **changes):
    """A GPTModel as somebody else builds it, or the part of it on the first or the last stage."""
    torch.manual_seed(layers)
    changes = {"calculate_per_token_loss": True, "finalize_model_grads_func": finalize_model_grads} | changes
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.2,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **changes,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(config, spec, vocab, SEQUENCE, first, last, position_embedding_type="rope")


def wrap(model, **settings):
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **settings)
    return [DistributedDataParallel(config=model.config, ddp_config=ddp, module=model)]


def step_of(student, teacher, ctx, loss=None):
    """A step of a student with a teacher on one stage."""
    entries = loss_entries(loss or LossConfig(), LiveTeacher([teacher], ctx, VOCAB))
    return DistillationStep(student, entries, ctx, VOCAB)


def micro_batches(replica=0, replicas=1, vocab=VOCAB):
    samples = Samples(STEPS * NUM_MICROBATCHES * MICRO_BATCH, SEQUENCE, vocab)
    items = [samples[number] for number in range(len(samples))]
    for first in range(replica * MICRO_BATCH, len(items), replicas * MICRO_BATCH):
        yield {key: torch.stack([item[key] for item in items[first : first + MICRO_BATCH]]) for key in items[0]}


def run_documented_loop(student, teacher, micro_batches, replicas=1):
    """The losses that it prints, by step."""
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 20
    settings = OptimizerConfig(optimizer="sgd", lr=0.5, sgd_momentum=0.0, weight_decay=0.0, clip_grad=0.0)
    names = dict(
        student=student,
        teacher=teacher,
        optimizer=get_megatron_optimizer(settings, student, use_gloo_process_groups=True),
        tokenizer=SimpleNamespace(vocab_size=VOCAB),
        steps=STEPS,
        num_microbatches=NUM_MICROBATCHES // replicas,
        micro_batches=micro_batches,
    )
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return [list(map(float, line.split())) for line in printed.getvalue().splitlines()]


class LoudWeights(RandomWeights):
    """So that predictions differ."""

    def read(self, param, index):
        return super().read(param, index) * (10 if len(index) == 2 else 1)


def loop_on_rank(folder, layout):
    """The loop of the documentation on one rank of a layout."""
    with parallel_context(layout) as place:
        parts = dict(
            first=place.is_first_stage,
            last=place.is_last_stage,
            vocab=104,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            pipeline_dtype=torch.float32,
        )
        student, teacher = own_model(32, 2, **parts), own_model(48, 4, **parts)
        for model in (student, teacher):
            network = network_of(model, vocab_size=VOCAB)
            load_weights([model], LoudWeights(network, seed=len(network.layers)), place)
        replicas = place.layout.replicas
        found = run_documented_loop(wrap(student), [teacher], micro_batches(place.data_rank, replicas), replicas)
        torch.save(found, folder / f"{layout.tensor}_{layout.pipeline}_{dist.get_rank()}.pt")


def test_the_documented_loop_does_not_depend_on_the_layout(tmp_path):
    loop_on_rank(tmp_path, ParallelConfig())
    expected = torch.load(tmp_path / "1_1_0.pt")
    for layout in (ParallelConfig(tensor=2, pipeline=2), ParallelConfig(pipeline=2, data=2)):
        run_on_ranks(4, loop_on_rank, tmp_path, layout)
        for rank in range(4):
            found = torch.load(tmp_path / f"{layout.tensor}_{layout.pipeline}_{rank}.pt")
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert expected[0][0] > 1.05 * expected[-1][0] > 0


def test_the_documented_loop_trains_like_a_direct_one():
    with parallel_context(ParallelConfig()):
        student = wrap(own_model(32, 2))
        found = run_documented_loop(student, [own_model(48, 3)], micro_batches())

        # The same with autograd alone, on whole logits.
        network, teacher, batches, expected = own_model(32, 2), own_model(48, 3), micro_batches(), []
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        for _ in range(STEPS):
            sums, count = torch.zeros(2), 0
            for batch in itertools.islice(batches, NUM_MICROBATCHES):
                inputs = batch["tokens"], batch["position_ids"], None
                log_p, log_q = network(*inputs).log_softmax(-1), teacher(*inputs).detach().log_softmax(-1)
                kl = (log_q.exp() * (log_q - log_p)).sum(-1)
                lm = -log_p.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
                sums = sums + torch.stack([(kl * batch["loss_mask"]).sum(), (lm * batch["loss_mask"]).sum()])
                count += batch["loss_mask"].sum()
            optimizer.zero_grad()
            ((sums[0] + 0.1 * sums[1]) / count).backward()
            optimizer.step()
            expected.append((sums / count).tolist())
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert expected[0][0] > 1.1 * expected[-1][0]  # it has learned something
        for (name, ours), theirs in zip(student[0].module.named_parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_megatrons_wrapper_for_bf16_changes_nothing():
    """It hands out the last hidden state in float32, and a frozen teacher in it is not one to be trained."""
    found = []
    with parallel_context(ParallelConfig()) as ctx:
        for wrapper in (lambda model: Float16Module(model.config, model), lambda model: model.bfloat16()):
            student, teacher = (wrapper(own_model(*size, bf16=True)) for size in ((32, 2), (48, 3)))
            teacher.requires_grad_(False)
            step = step_of(wrap(student), teacher, ctx, LossConfig(lm_weight=0.1))
            result = step.train([next(micro_batches())])
            found.append((result.losses, [parameter.main_grad for parameter in student.parameters()]))
    (wrapped, gradients), (plain, expected) = found
    assert wrapped == plain
    for ours, theirs in zip(gradients, expected, strict=True):
        assert theirs.any() and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "changes, sequence, message",
    [
        ({"calculate_per_token_loss": False}, False, "config.calculate_per_token_loss = False: losses are sums"),
        ({"finalize_model_grads_func": None}, False, "config.finalize_model_grads_func = None: set it to"),
        ({}, True, "give current_context.sequence=False"),
        ({"mtp_num_layers": 1}, False, "config.mtp_num_layers = 1: layers that predict several tokens"),
        ({"fp16": True}, False, "config.fp16 = True: gradients of logits and states are not scaled"),
    ],
)
def test_a_model_whose_gradients_would_be_others_is_refused(changes, sequence, message):
    with parallel_context(ParallelConfig()):
        student, teacher = wrap(own_model(32, 2, **changes)), own_model(48, 3)
        step = step_of(student, teacher, current_context(sequence))
        with pytest.raises(ConfigError, match=message):
            step.train([next(micro_batches())])


def test_parameters_that_arrive_while_layers_run_are_refused():
    """The output weight is used without its layer."""
    with parallel_context(ParallelConfig()):
        student = wrap(
            own_model(32, 2), use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        )
        step = step_of(student, own_model(48, 3), current_context())
        with pytest.raises(ConfigError, match="ddp_config.overlap_param_gather = True"):
            step.train([next(micro_batches())])


@pytest.mark.parametrize(
    "loss, message",
    [
        (LossConfig(logits=LogitsConfig(temperature=0.0)), "loss.logits.temperature = 0.0"),
        (LossConfig(logits=LogitsConfig(top_k=102)), "top_k = 102 is more than the vocabulary's 101"),
        (LossConfig(hidden=HiddenConfig(0.5)), "loss.hidden.weight = 0.5, and there is no HiddenDistance"),
    ],
)
def test_a_loss_that_does_not_go_with_the_models_is_refused(loss, message):
    with parallel_context(ParallelConfig()), pytest.raises(ConfigError, match=message):
        step_of(wrap(own_model(32, 2)), own_model(48, 3), current_context(), loss)


def test_a_teacher_that_is_trained_has_to_share_the_padding():
    """The rows of a frozen one are split as the student's; an optimiser knows those of a trained one where they are."""
    with parallel_context(ParallelConfig()):
        teacher = LiveTeacher(wrap(own_model(48, 3, vocab=128)), current_context(), VOCAB, name="the large one")
        with pytest.raises(ConfigError, match="padded to 101, and that of the large one, which is trained, to 128"):
            DistillationStep(wrap(own_model(32, 2)), loss_entries(LossConfig(), teacher), current_context(), VOCAB)
