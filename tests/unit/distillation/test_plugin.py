"""The loop of the documentation, with models and an optimiser that know nothing of this project."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from minitron_megatron import LossConfig, TeacherStudent, current_groups
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.parallel.groups import process_groups
from tests.tiny import Samples

VOCAB, SEQUENCE, MICRO_BATCH, STEPS, NUM_MICROBATCHES = 101, 16, 2, 3, 2
DOCUMENTATION = Path(__file__).parents[3] / "docs/distillation.md"


def own_model(hidden, layers, **changes):
    """A GPTModel as somebody else builds it."""
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
    return GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="rope")


def wrap(model):
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return [DistributedDataParallel(config=model.config, ddp_config=ddp, module=model)]


def micro_batches():
    samples = Samples(STEPS * NUM_MICROBATCHES * MICRO_BATCH, SEQUENCE, VOCAB)
    items = [samples[number] for number in range(len(samples))]
    for first in range(0, len(items), MICRO_BATCH):
        yield {key: torch.stack([item[key] for item in items[first : first + MICRO_BATCH]]) for key in items[0]}


def test_the_documented_loop_trains_like_a_direct_one(capsys):
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 20
    with process_groups(ParallelConfig()):
        student = wrap(own_model(32, 2))
        settings = OptimizerConfig(optimizer="sgd", lr=0.5, sgd_momentum=0.0, weight_decay=0.0, clip_grad=0.0)
        names = dict(
            student=student,
            teacher=[own_model(48, 3)],
            optimizer=get_megatron_optimizer(settings, student, use_gloo_process_groups=True),
            tokenizer=SimpleNamespace(vocab_size=VOCAB),
            steps=STEPS,
            num_microbatches=NUM_MICROBATCHES,
            micro_batches=micro_batches(),
        )
        exec(code, names)
        found = [list(map(float, line.split())) for line in capsys.readouterr().out.splitlines()]

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
    with process_groups(ParallelConfig()) as groups:
        for wrapper in (lambda model: Float16Module(model.config, model), lambda model: model.bfloat16()):
            student, teacher = (wrapper(own_model(*size, bf16=True)) for size in ((32, 2), (48, 3)))
            teacher.requires_grad_(False)
            pair = TeacherStudent(wrap(student), [teacher], groups, LossConfig(lm_weight=0.1), VOCAB)
            result = pair.train([next(micro_batches())])
            found.append((result, [parameter.main_grad for parameter in student.parameters()]))
    (wrapped, gradients), (plain, expected) = found
    assert (wrapped.kd_logits, wrapped.lm) == (plain.kd_logits, plain.lm)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert theirs.any() and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "changes, sequence, message",
    [
        ({"calculate_per_token_loss": False}, False, "config.calculate_per_token_loss = False: losses are sums"),
        ({"finalize_model_grads_func": None}, False, "config.finalize_model_grads_func = None: set it to"),
        ({}, True, "give current_groups.sequence=False"),
        ({"mtp_num_layers": 1}, False, "config.mtp_num_layers = 1: layers that predict several tokens"),
    ],
)
def test_a_model_whose_gradients_would_be_others_is_refused(changes, sequence, message):
    with process_groups(ParallelConfig()):
        student, teacher = wrap(own_model(32, 2, **changes)), own_model(48, 3)
        pair = TeacherStudent(student, [teacher], current_groups(sequence), LossConfig(), VOCAB)
        with pytest.raises(ConfigError, match=message):
            pair.train([next(micro_batches())])
