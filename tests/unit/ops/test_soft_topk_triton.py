"""The soft top-k kernel: masks, a fractional k per row, gradients of logits and k."""

import pytest
import torch

from routedvit.ops import soft_topk
from routedvit.ops.row_tiles_triton import MAX_BLOCK
from tests.unit.ops.comparing import assert_as_exact_as_the_reference, draw

LONG = 2 * MAX_BLOCK + 17


@pytest.mark.parametrize("spread", [0.3, 3.0, 27.0])
@pytest.mark.parametrize("n", [1, 7, 196, LONG])
def test_every_row_has_a_mask_and_a_fractional_k_of_its_own(n, spread, device):
    logits, mask = draw(3, n) * spread, (draw(3, n, seed=1) > -0.5).to(device)
    # no whole number: whether the last gate is 1 or just below is rounding there at a large spread,
    # and the gradient of k jumps with it
    k = torch.tensor([0.23, 1.3, 0.7]) * torch.tensor([n, 1, n])
    assert_as_exact_as_the_reference(
        lambda s, k: soft_topk(s, k, eps=0.7, mask=mask), logits, k, device=device
    )


def test_masked_entries_get_nothing_and_short_rows_give_one_to_each_entry(device):
    mask = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4], device=device)
    logits = draw(3, 4).to(device).requires_grad_()
    gates = soft_topk(logits, 3, mask=mask)
    assert gates[0].tolist() == [1, 1, 0, 0]
    assert gates[1].tolist() == [0, 0, 0, 0]
    assert gates[2].sum().item() == pytest.approx(3)
    gates.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("k", [1, 9.5, 63, 64])
def test_ties_get_equal_gates_and_all_or_nothing_is_exact(k, device):
    gates = soft_topk(torch.full((2, 64), 5.0, device=device), k)
    assert gates.unique().numel() == 1
    torch.testing.assert_close(gates, torch.full_like(gates, k / 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_solved_in_float32(dtype, device):
    logits = (draw(2, 300) * 10).to(device, dtype).requires_grad_()
    gates = soft_topk(logits, 100)
    assert gates.dtype == torch.float32
    assert torch.equal(gates, soft_topk(logits.detach().float(), 100))
    gates.square().sum().backward()
    assert logits.grad.dtype == dtype


def test_strided_logits_and_gradients(device):
    logits, weight = draw(50, 3).to(device), draw(50, 3, seed=1).to(device)
    grads = []
    for strided in (True, False):
        s = logits.clone().requires_grad_()
        rows, weights = (s.t(), weight.t()) if strided else (s.t().contiguous(), weight.t().clone())
        (soft_topk(rows, 9) * weights).sum().backward()
        grads.append(s.grad)
    assert torch.equal(grads[0], grads[1])


def test_operators_are_registered_soundly(device):
    logits = draw(2, 10).to(device).requires_grad_()
    k = torch.tensor([[2.5], [4.0]], device=device, requires_grad=True)
    mask = torch.ones(2, 10, dtype=torch.bool, device=device)
    ops = torch.ops.routedvit
    torch.library.opcheck(ops.soft_topk.default, (logits, k, 0.5, None))
    torch.library.opcheck(ops.soft_topk.default, (logits, k, 0.5, mask))
    gates = ops.soft_topk(logits, k, 0.5, mask).detach()
    torch.library.opcheck(ops.soft_topk_backward.default, (gates, gates, 0.5))
