"""Gather and scatter of routed tokens against a plain loop."""

import pytest
import torch
from torch import Tensor

from routedvit.ops import gather_tokens, prepend_prefix, scatter_add_tokens


def case(k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(3, 7, 5, generator=generator)
    index = torch.stack([torch.randperm(7, generator=generator)[:k].sort().values for _ in x])
    return (
        x,
        index,
        torch.randn(3, k, 5, generator=generator),
        torch.rand(3, k, generator=generator),
    )


@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_gather_and_scatter_are_loops(k):
    x, index, rows, gate = case(k)
    gathered, scattered = gather_tokens(x, index), scatter_add_tokens(x, index, rows, gate)
    expected = x.clone()
    for image in range(3):
        for j, i in enumerate(index[image].tolist()):
            assert torch.equal(gathered[image, j], x[image, i])
            expected[image, i] += gate[image, j] * rows[image, j]
    torch.testing.assert_close(scattered, expected)


def test_inputs_are_left_alone_and_may_be_non_contiguous():
    x, index, rows, gate = case(4)
    before = x.clone()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(
        scatter_add_tokens(strided, index, rows, gate), scatter_add_tokens(x, index, rows, gate)
    )
    assert torch.equal(gather_tokens(strided, index), gather_tokens(x, index))
    assert torch.equal(x, before)


def test_gradients_are_those_of_finite_differences():
    x, index, rows, gate = (t.double() if t.is_floating_point() else t for t in case(3))
    for t in (x, rows, gate):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, index), x)
    assert torch.autograd.gradcheck(
        lambda x, rows, gate: scatter_add_tokens(x, index, rows, gate), (x, rows, gate)
    )


def test_result_has_the_type_of_the_tokens_whatever_the_gate():
    x, index, rows, gate = case(4)
    out = scatter_add_tokens(x.bfloat16(), index, rows.bfloat16(), gate)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_rows_may_have_another_type_than_the_tokens(types, residual):
    x, index, rows, gate = case(4)
    base, rows = x.to(types[0]).requires_grad_(), rows.to(types[1]).requires_grad_()
    summand = x.flip(0) if residual else None
    out = scatter_add_tokens(base, index, rows, gate, summand)
    assert out.dtype == (torch.float32 if residual else base.dtype)
    expected = scatter_add_tokens(base.float(), index, rows.float(), gate, summand)
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7)
    out.float().square().sum().backward()
    assert (base.grad.dtype, rows.grad.dtype) == types


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3), (2, 0)])
def test_prefix_comes_first_with_gate_one(shape):
    index, gate = torch.arange(shape[-1]).expand(shape), torch.full(shape, 0.5)
    with_prefix, gates = prepend_prefix(index, gate, 2)
    assert with_prefix.shape == gates.shape == (*shape[:-1], shape[-1] + 2)
    assert (with_prefix == torch.arange(shape[-1] + 2)).all()
    assert (gates[..., :2] == 1).all()
    assert (gates[..., 2:] == 0.5).all()
    assert prepend_prefix(index, gate, 0)[0] is index
