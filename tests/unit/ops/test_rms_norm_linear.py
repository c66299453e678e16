"""RMSNorm and a linear layer in one are the two of them, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from routedvit.ops import rms_norm_linear
from tests.unit.ops.comparing import draw


def one_by_one(x, norm_weight, weight, bias, eps):
    return F.linear(F.rms_norm(x, norm_weight.shape, norm_weight, eps), weight, bias)


def run(function, dtype, shape, *, bias=True, eps=1e-6):
    drawn = (draw(*shape) * 3, draw(shape[-1], seed=1), draw(5, shape[-1], seed=2), draw(5, seed=3))
    x, norm_weight, weight, b = (t.to(dtype).requires_grad_() for t in drawn)
    out = function(x, norm_weight, weight, b if bias else None, eps)
    out.backward(draw(*shape[:-1], 5, seed=4).to(dtype))
    leaves = (x, norm_weight, weight, b) if bias else (x, norm_weight, weight)
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]


@pytest.mark.parametrize("shape", [(1, 4), (5, 8), (2, 3, 4, 16), (0, 8)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_equals_the_two_forward_and_backward(shape, bias, eps):
    ours = run(rms_norm_linear, torch.float64, shape, bias=bias, eps=eps)
    theirs = run(one_by_one, torch.float64, shape, bias=bias, eps=eps)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradient_of_rows_that_are_not_contiguous():
    leaves = [draw(4, 6, 8), draw(8, seed=1), draw(3, 8, seed=2), draw(3, seed=3)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda x, *w: rms_norm_linear(x[:, ::2], *w, 1e-6), leaves)


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    weights = (torch.ones(8), draw(3, 8), None)
    rms_norm_linear(x, *weights, 1e-6).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_two(dtype):
    exact = run(one_by_one, torch.float64, (64, 384))
    ours, theirs = (run(f, dtype, (64, 384)) for f in (rms_norm_linear, one_by_one))
    for found, usual, truth in zip(ours, theirs, exact, strict=True):
        last_place = torch.finfo(dtype).eps * truth.abs().max()
        assert (found - truth).abs().max() <= 3 * (usual - truth).abs().max() + last_place


@pytest.mark.parametrize("bias", [True, False])
def test_in_autocast_products_are_bf16(bias):
    with torch.autocast("cpu", torch.bfloat16):
        out = run(rms_norm_linear, torch.float32, (6, 32), bias=bias)
    exact = run(one_by_one, torch.float64, (6, 32), bias=bias)
    assert 1e-4 < (out[0] - exact[0]).abs().max() / exact[0].abs().max() < 2e-2


def test_compiled_equals_eager():
    compiled = torch.compile(rms_norm_linear, backend="aot_eager", fullgraph=True)
    found = run(compiled, torch.float64, (6, 8))
    torch.testing.assert_close(found, run(rms_norm_linear, torch.float64, (6, 8)))


def test_a_row_of_zeros_is_zero_in_fp16_autocast():
    with torch.autocast("cpu", torch.float16):
        out = rms_norm_linear(torch.zeros(2, 8), torch.ones(8), draw(3, 8), None, 1e-12)
    assert not out.any()
