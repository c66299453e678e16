"""The coordinate descent kernel against our loop, which is that of colt5-attention."""

import pytest
import torch

from routedvit.ops import coordinate_descent
from routedvit.ops.row_tiles_triton import MAX_BLOCK
from tests.unit.ops.comparing import assert_as_exact_as_the_reference, draw


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 7, 196])
@pytest.mark.parametrize(("spread", "eps"), [(1.0, 1.0), (5.0, 1.0), (27.0, 1.0), (1.0, 0.03)])
def test_gates_and_gradients_are_as_exact_as_the_reference(masked, n, spread, eps, device):
    mask = (draw(3, n, seed=1) > -0.5).to(device) if masked else None
    if masked:
        mask[:, 0] = True
    assert_as_exact_as_the_reference(
        lambda s, k: coordinate_descent(s, k, eps=eps, mask=mask),
        draw(3, n) * spread,
        torch.tensor([[1.0], [0.3 * n], [0.9 * n]]),
        device=device,
        # of one entry the reference is exact, while a GPU's exponential and division are within 2
        last_places=8.0 if n == 1 else 2.0,
    )


@pytest.mark.parametrize("num_iterations", [1, 2, 50])
def test_any_number_of_iterations_has_the_right_gradient(num_iterations, device):
    """colt5-attention's own kernel is known to go wrong past 20."""
    assert_as_exact_as_the_reference(
        lambda s, k: coordinate_descent(s, k, eps=0.5, num_iterations=num_iterations),
        draw(2, 100) * 3,
        torch.tensor([[9.0], [30.5]]),
        device=device,
    )


def test_rows_of_several_blocks(device):
    n = MAX_BLOCK + 5
    assert_as_exact_as_the_reference(
        lambda s, k: coordinate_descent(s, k, num_iterations=4),
        draw(1, n),
        torch.tensor([[n / 4]]),
        device=device,
    )


def test_a_row_that_is_masked_as_a_whole_has_no_gradient(device):
    mask = torch.tensor([[True] * 9, [False] * 9], device=device)
    logits = draw(2, 9).to(device).requires_grad_()
    k = torch.full((2, 1), 3.0, device=device, requires_grad=True)
    coordinate_descent(logits, k, mask=mask).square().sum().backward()
    assert logits.grad[0].isfinite().all()
    assert (logits.grad[1] == 0).all()
    assert k.grad[0] != 0
    assert k.grad[1] == 0


def test_nan_is_not_hidden_and_stays_in_its_row(device):
    logits = draw(3, 9)
    logits[1, 4] = logits[2] = float("nan")
    gates = coordinate_descent(logits.to(device), torch.full((3, 1), 3.0, device=device))
    assert gates[0].isfinite().all()
    assert gates[1, 4].isnan()
    assert gates[2].isnan().all()


def test_operators_are_registered_soundly(device):
    logits = draw(2, 10).to(device).requires_grad_()
    k = torch.tensor([[2.5], [4.0]], device=device, requires_grad=True)
    mask = torch.ones(2, 10, dtype=torch.bool, device=device)
    ops, schedule = torch.ops.routedvit, (0.1, 4.0, 0.7)
    for m in (mask, None):
        torch.library.opcheck(ops.coordinate_descent.default, (logits, k, m, *schedule, 5))
    gates, shifts = (t.detach() for t in ops.coordinate_descent(logits, k, mask, *schedule, 5))
    arguments = (logits.detach(), k.detach(), mask, gates, shifts, gates, *schedule)
    torch.library.opcheck(ops.coordinate_descent_backward.default, arguments)
