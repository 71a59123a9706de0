import pytest
import torch
from torch.optim import adam

from minitron_megatron.config.schema import DType, OptimizerConfig, ParallelConfig
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.training.optimizer import setup_optimizer
from tests.rounding import assert_rounded, of_operations
from tests.tiny import LLAMA


@pytest.mark.parametrize("dtype", [DType.FP32, DType.BF16])
def test_a_step_is_that_of_adamw_in_its_fused_form(dtype, monkeypatch):
    monkeypatch.setattr(adam, "_single_tensor_adam", lambda *a, **o: pytest.fail("not fused"))
    config = OptimizerConfig(lr=1e-2, min_lr=1e-2, warmup_steps=0, clip_grad=0.0)
    with parallel_context(ParallelConfig()) as ctx:
        model_chunks = build_model(network_from_config(LLAMA), ctx, dtype)
        weights = {name: weight.detach().float().clone() for name, weight in model_chunks[0].named_parameters()}
        trained = setup_optimizer(model_chunks, config, 2, dtype, ctx)
        torch.manual_seed(0)
        gradients = {name: torch.randn(weight.shape) for name, weight in weights.items()}
        for name, parameter in model_chunks[0].named_parameters():
            parameter.main_grad.copy_(gradients[name])
        trained.step()
        found = {name: parameter.detach() for name, parameter in model_chunks[0].named_parameters()}
    for name, weight in weights.items():
        # The first step of Adam is one of the learning rate, whatever the gradient.
        decay = 0.0 if weight.dim() == 1 else config.weight_decay
        weight, gradient = weight.double(), gradients[name].double()
        expected = weight * (1 - config.lr * decay) - config.lr * gradient / (gradient.abs() + config.eps)
        # Of the weight the decay is taken, and moments, their corrections, root, quotient and rate make the step.
        error = of_operations(3, torch.float32) * weight.abs() + of_operations(16, torch.float32) * config.lr
        assert_rounded(found[name], expected, error)
