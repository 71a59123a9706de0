import pytest
import torch
import torch.nn.functional as F

from minitron_megatron.parallel.cpu import _OnCPU, install_cpu_backend


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled on CUDA")
def test_nothing_is_compiled():
    def compiler(*args):
        raise AssertionError("a C++ compiler is asked for")

    install_cpu_backend()
    assert torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(1)) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="not installed on CUDA")
def test_python_in_a_backward_pass_sees_no_cuda_either():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return grad.new_full(grad.shape, 2.0, device="cuda") * grad

    install_cpu_backend()
    x = torch.ones(3, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_bf16_products_in_float32_are_rounded_once_and_have_gradients():
    torch.manual_seed(0)
    a, b = torch.randn(6, 300).bfloat16(), torch.randn(300, 5).bfloat16()
    wide = a.float().requires_grad_(), b.float().requires_grad_()
    expected = (wide[0] @ wide[1]).bfloat16()
    expected.sum().backward()
    out = torch.empty_like(expected)
    with _OnCPU(widen=True):
        for multiply in (
            lambda a, b: a @ b,
            torch.matmul,
            torch.Tensor.matmul,
            torch.mm,
            torch.Tensor.mm,
            lambda a, b: F.linear(a, b.T),
            lambda a, b: torch.bmm(a[None], b[None])[0],
            lambda a, b: torch.addmm(torch.zeros(5).bfloat16(), a, b),
        ):
            inputs = a.clone().requires_grad_(), b.clone().requires_grad_()
            found = multiply(*inputs)
            found.sum().backward()
            assert torch.equal(found, expected)
            for one, other in zip(inputs, wide, strict=True):
                assert torch.equal(one.grad, other.grad.bfloat16())
        assert torch.mm(a, b, out=out) is out and torch.equal(out, expected)
        query = torch.randn(1, 2, 7, 8).bfloat16()
        attended = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    wide_query = query.float()
    expected = F.scaled_dot_product_attention(wide_query, wide_query, wide_query, is_causal=True)
    assert torch.equal(attended, expected.bfloat16())
