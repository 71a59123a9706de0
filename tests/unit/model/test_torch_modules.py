"""The building blocks of the local layer spec against torch's own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minitron_megatron.model import torch_modules
from tests.rounding import assert_rounded, of_operations


def config(normalization, zero_centered=False):
    return SimpleNamespace(
        normalization=normalization, layernorm_zero_centered_gamma=zero_centered, layernorm_epsilon=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_are_those_of_torch(dtype):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(5, 3, 16, dtype=dtype), torch.randn(16), torch.randn(5, 3, 16, dtype=dtype)
    found = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [part.detach().double().requires_grad_() for part in found]
    given = found[0].detach().clone()
    out = torch_modules.normalize(*found, None, config("RMSNorm"))
    expected = F.rms_norm(exact[0], (16,), exact[1], 1e-5)
    out.backward(grad)
    expected.backward(grad.double())
    # In float32 a sum over the 16 channels and a handful of products, relative to the largest term of a sum.
    error = of_operations(16 + 8, torch.float32)
    assert_rounded(out, expected.detach(), error * expected.detach().abs())
    assert_rounded(found[0].grad, exact[0].grad, error * exact[0].grad.abs().max())
    # Over the 15 tokens another one, and what it sums.
    terms = grad.double() * expected.detach() / exact[1].detach()
    assert_rounded(found[1].grad, exact[1].grad, of_operations(16 + 8 + 15, torch.float32) * terms.abs().sum((0, 1)))
    # Others need the input for their own backward pass.
    assert torch.equal(found[0], given)


def test_layer_norm_gets_one_number_format(monkeypatch):
    """As CUDA wants it; the CPU's takes two."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 16).bfloat16(), torch.randn(16).bfloat16(), torch.randn(16).bfloat16()
    expected = F.layer_norm(x.float(), (16,), weight.float() + 1, bias.float(), 1e-5).bfloat16()

    def layer_norm(x, shape, weight, bias, eps, plain=F.layer_norm):
        assert x.dtype is weight.dtype is bias.dtype is torch.float32
        return plain(x, shape, weight, bias, eps)

    monkeypatch.setattr(F, "layer_norm", layer_norm)
    found = torch_modules.normalize(x, weight, bias, config("LayerNorm", zero_centered=True))
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected)
