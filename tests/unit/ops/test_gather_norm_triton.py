"""The gather-norm kernel: values and the gradients of tokens, weight and bias."""

import pytest
import torch

from routedvit.ops import gather_norm, gather_norm_triton
from tests.unit.ops.comparing import assert_as_exact_as_the_reference, draw
from tests.unit.ops.test_tokens_triton import LOW, choose


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(("n", "k", "dim"), [(1, 1, 8), (7, 7, 48), (40, 12, 384)])
def test_as_exact_as_the_reference(n, k, dim, rms, dtype, device):
    index = choose(k, n, 2, 2).to(device)
    parameters = [1 + draw(dim) / 10] if rms else [1 + draw(dim) / 10, draw(dim, seed=1)]
    assert_as_exact_as_the_reference(
        lambda x, *parameters: gather_norm(x, index, *parameters, eps=1e-5, rms=rms),
        draw(2, n, dim).to(dtype) * 2 + 0.5,
        *(p.to(dtype) for p in parameters),
        device=device,
    )


def test_weight_gradients_are_complete_when_programs_walk_over_many_tokens(device, monkeypatch):
    monkeypatch.setattr(gather_norm_triton, "MAX_PROGRAMS", 3)
    index = choose(100, 300, 2, 1).to(device)
    assert_as_exact_as_the_reference(
        lambda x, w, b: gather_norm(x, index, w, b),
        draw(2, 300, 384),
        draw(384),
        draw(384, seed=1),
        device=device,
    )


@pytest.mark.parametrize("rms", [False, True])
def test_an_infinite_row_that_no_route_took_is_nobodys_gradient(rms, device):
    index = choose(3, 7, 2, 1).to(device)
    x = draw(2, 7, 48).to(device)
    untouched = [i for i in range(7) if i not in index[0, 0]]
    x[0, untouched] = torch.inf
    x.requires_grad_()
    weight = draw(48).to(device).requires_grad_()
    gather_norm(x, index, weight, rms=rms).square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert not x.grad[0, untouched].any()


def test_operators_are_registered_soundly(device):
    ops = torch.ops.routedvit
    x, index = draw(2, 7, 8).to(device).requires_grad_(), choose(3, 7, 2, 2).to(device)
    weight, bias = (draw(8, seed=s).to(device).requires_grad_() for s in range(2))
    torch.library.opcheck(ops.gather_norm.default, (x, index, weight, bias, 1e-6, False))
    torch.library.opcheck(ops.gather_norm.default, (x, index, weight, None, 1e-6, True))
    grad = draw(2, 2, 3, 8).to(device)
    arguments = (x.detach(), index, weight.detach(), grad, 1e-6, False)
    torch.library.opcheck(ops.gather_norm_backward.default, arguments)
