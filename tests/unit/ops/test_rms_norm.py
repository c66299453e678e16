"""RMSNorm in few passes is RMSNorm, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from routedvit.ops import rms_norm
from tests.unit.ops.comparing import draw


@pytest.mark.parametrize("shape", [(1,), (5, 8), (2, 3, 4, 16), (0, 8)])
@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_equals_pytorch_forward_and_backward(shape, eps):
    results = []
    for function in (rms_norm, lambda x, w, e: F.rms_norm(x, w.shape, w, e)):
        x = draw(*shape).double().requires_grad_()
        weight = draw(shape[-1], seed=1).double().requires_grad_()
        out = function(x, weight, eps)
        out.backward(draw(*shape, seed=2).double())
        results.append((out.detach(), x.grad, weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_gradient_of_rows_that_are_not_contiguous():
    x = draw(4, 6, 8).double().requires_grad_()
    weight = draw(8, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x[:, ::2], w, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x.mT, w[:6], 1e-6), (x, weight))


def test_error_in_fp32_is_that_of_pytorch():
    x, weight, grad = draw(64, 384) * 3, draw(384, seed=1), draw(64, 384, seed=2)

    def run(function, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        out = function(*leaves)
        out.backward(grad.to(dtype))
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    def pytorch(x, w):
        return F.rms_norm(x, w.shape, w, 1e-6)

    exact = run(pytorch, torch.float64)
    ours = run(lambda x, w: rms_norm(x, w, 1e-6), torch.float32)
    for found, theirs, truth in zip(ours, run(pytorch, torch.float32), exact, strict=True):
        last_place = torch.finfo(torch.float32).eps * truth.abs().max()
        assert (found - truth).abs().max() <= 3 * (theirs - truth).abs().max() + last_place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 40.0])
def test_low_precision_is_rounded_only_at_the_end(dtype, scale):
    x, weight = (draw(8, 768) * scale).to(dtype), draw(768, seed=1).to(dtype)
    x[0] = 0
    exact = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-12)
    out = rms_norm(x, weight, 1e-12).double()
    torch.testing.assert_close(out, exact, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-4)
