"""The gather and scatter kernels against plain loops and against the reference."""

import pytest
import torch
from torch import Tensor

from routedvit.ops import gather_all, gather_tokens, scatter_add_tokens
from tests.unit.ops.comparing import assert_as_exact_as_the_reference, draw

LOW = [torch.float32, torch.bfloat16, torch.float16]


def choose(k: int, n: int, *shape: int) -> Tensor:
    """Ascending indices [*shape, k], different in every row."""
    return draw(*shape, n).argsort(-1)[..., :k].sort(-1).values


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 0), (7, 1), (7, 4), (7, 7), (300, 100)])
@pytest.mark.parametrize("dim", [5, 48])
def test_gather_and_scatter_are_loops(n, k, dim, device):
    x, rows, gate, index = draw(3, n, dim), draw(3, k, dim), draw(3, k), choose(k, n, 3)
    gathered = gather_tokens(x.to(device), index.to(device)).cpu()
    out = scatter_add_tokens(*(t.to(device) for t in (x, index, rows, gate))).cpu()
    expected = x.clone()
    for image in range(3):
        for j, i in enumerate(index[image].tolist()):
            assert torch.equal(gathered[image, j], x[image, i])
            expected[image, i] += gate[image, j] * rows[image, j]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("n", "k", "dim"), [(1, 1, 8), (7, 7, 48), (50, 12, 384)])
def test_gather_of_overlapping_routes_sums_their_gradients(n, k, dim, dtype, device):
    index = choose(k, n, 2, 3).to(device)
    assert_as_exact_as_the_reference(
        lambda x: gather_tokens(x, index), draw(2, n, dim).to(dtype), device=device
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("n", "k", "dim"), [(1, 1, 8), (7, 7, 48), (50, 12, 384)])
def test_gradients_of_all_that_was_gathered_are_added_where_they_belong(n, k, dim, dtype, device):
    one, several = choose(k, n, 2).to(device), choose(n // 2, n, 2, 3).to(device)

    def everything(x: Tensor) -> Tensor:
        x, rows = gather_all(x, [one, several])
        return torch.cat([x * 2, rows[0] * 3, *(rows[1] * 4).unbind(1)], 1)

    assert_as_exact_as_the_reference(everything, draw(2, n, dim).to(dtype), device=device)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("residual", [None, "same", torch.float32])
@pytest.mark.parametrize(("n", "k", "dim"), [(1, 1, 8), (7, 7, 48), (50, 12, 384)])
def test_scatter_and_all_its_gradients(n, k, dim, dtype, residual, device):
    index = choose(k, n, 2).to(device)
    inputs = [draw(2, n, dim).to(dtype), draw(2, k, dim, seed=1).to(dtype), draw(2, k).sigmoid()]
    if residual is not None:
        inputs.append(draw(2, n, dim, seed=2).to(dtype if residual == "same" else residual))
    assert_as_exact_as_the_reference(
        lambda base, rows, gate, *rest: scatter_add_tokens(base, index, rows, gate, *rest),
        *inputs,
        device=device,
    )


def test_whole_images_are_tokens_too_under_a_gate_that_learns_nothing(device):
    """As stochastic depth moves them: few, and each as wide as N * D."""
    index, gate = choose(3, 5, 1).to(device), torch.full((1, 3), 5 / 3, device=device)

    def images(x: Tensor, rows: Tensor) -> Tensor:
        x, kept = gather_all(x, [index])
        return scatter_add_tokens(x, index, rows * kept[0], gate.to(x.device))

    assert_as_exact_as_the_reference(
        images, draw(1, 5, 2600), draw(1, 3, 2600, seed=1), device=device
    )


def test_inputs_may_be_strided_and_are_left_alone(device):
    x, index = draw(7, 3, 16).to(device).transpose(0, 1), choose(4, 7, 3).to(device)
    rows, gate = draw(4, 3, 16).to(device).transpose(0, 1), draw(4, 3).to(device).t()
    before = [t.clone() for t in (x, rows, gate)]
    dense = [t.contiguous() for t in (x, rows, gate)]
    assert torch.equal(gather_tokens(x, index), gather_tokens(dense[0], index))
    assert torch.equal(gather_tokens(x[:, 1:], index[:, :2]), gather_tokens(x, index[:, :2] + 1))
    scattered = scatter_add_tokens(x, index, rows, gate, x)
    assert torch.equal(scattered, scatter_add_tokens(dense[0], index, *dense[1:], dense[0]))
    assert all(torch.equal(a, b) for a, b in zip((x, rows, gate), before, strict=True))


def test_two_runs_are_bitwise_equal_with_an_expanded_gradient_too(device):
    base, rows, gate = draw(2, 50, 48), draw(2, 20, 48), draw(2, 20)
    index, found = choose(20, 50, 2).to(device), []
    for _ in range(2):
        leaves = [t.to(device).requires_grad_() for t in (base, rows, gate)]
        out = scatter_add_tokens(leaves[0], index, *leaves[1:])
        (out.sum() + gather_tokens(leaves[0], index).sum()).backward()
        found.append([out.detach(), *(t.grad for t in leaves)])
        for t in leaves:
            t.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operators_are_registered_soundly(device):
    ops = torch.ops.routedvit
    x, index = draw(2, 7, 8).to(device).requires_grad_(), choose(3, 7, 2, 2).to(device)
    rows, gate = (t.to(device).requires_grad_() for t in (draw(2, 3, 8), draw(2, 3)))
    torch.library.opcheck(ops.gather_tokens.default, (x, index))
    grad = draw(2, 2, 3, 8).to(device)
    torch.library.opcheck(ops.gather_tokens_backward.default, (index, grad, 7))
    arguments = (x.detach(), [index, index[:, :1]], [grad, grad[:, :1]])
    torch.library.opcheck(ops.gather_all_backward.default, arguments)
    for residual in (None, x.detach().clone().requires_grad_()):
        arguments = (x, index[:, 0], rows, gate, residual)
        torch.library.opcheck(ops.scatter_add_tokens.default, arguments)
    arguments = (index[:, 0], rows.detach(), gate.detach(), x.detach())
    torch.library.opcheck(ops.scatter_add_tokens_backward.default, arguments)
