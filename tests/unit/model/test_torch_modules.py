"""The building blocks of the local layer spec against torch's own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minitron_megatron.model import torch_modules


def config(normalization, zero_centered=False):
    return SimpleNamespace(
        normalization=normalization, layernorm_zero_centered_gamma=zero_centered, layernorm_epsilon=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_are_those_of_torch(dtype):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(5, 3, 16, dtype=dtype), torch.randn(16), torch.randn(5, 3, 16, dtype=dtype)
    found, expected = ([x.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2))
    given = found[0].detach().clone()
    torch_modules.normalize(*found, None, config("RMSNorm")).backward(grad)
    F.rms_norm(expected[0].float(), (16,), expected[1], 1e-5).to(dtype).backward(grad)
    torch.testing.assert_close(found[0].grad, expected[0].grad)
    torch.testing.assert_close(found[1].grad, expected[1].grad)
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
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected)
