"""Our coordinate descent is that of the PyPI package, gates and gradients."""

import pytest
import torch

from routedvit.ops import coordinate_descent, soft_topk

# a machine without network, such as one with a GPU may be, can lack it
coor_descent = pytest.importorskip("colt5_attention").coor_descent

GRID = [(1, 1.0), (27, 1.0), (54, 1.125), (196, 1.0)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("k", "ratio"), GRID)
@pytest.mark.parametrize(("spread", "eps"), [(1.0, 1.0), (5.0, 1.0), (27.0, 1.0), (1.0, 0.03)])
def test_equals_the_package_forward_and_gradient(masked, k, ratio, spread, eps):
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(4, 196, generator=generator, dtype=torch.float64) * spread
    weight = torch.randn(4, 196, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 196, generator=generator) > 0.3 if masked else None
    target = min(k * ratio, 196)
    results = []
    for ours in (True, False):
        s = logits.clone().requires_grad_()
        if ours:
            gates = soft_topk(s, target, eps=eps, mask=mask, solver="coordinate_descent")
        else:
            gates = coor_descent(
                s, n_iters=20, k=target, eps=eps, eps_init=4.0, eps_decay=0.7, mask=mask
            )
        (gates * weight).sum().backward()
        results.append((gates.detach(), s.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_masked_entries_have_no_gate_and_no_gradient():
    logits = torch.randn(4, 196, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.rand(4, 196, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[3] = False
    k = torch.full((4,), 27.0, requires_grad=True)
    gates = soft_topk(logits, k, mask=mask, solver="coordinate_descent")
    gates.square().sum().backward()
    assert (gates[~mask] == 0).all()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).any()
    assert (k.grad[:3] != 0).all()
    assert k.grad[3] == 0


def test_converges_to_the_exact_gates_where_the_spread_is_small():
    logits = torch.randn(4, 196, dtype=torch.float64)
    k = torch.full((4, 1), 27.0, dtype=torch.float64)
    gates = coordinate_descent(logits, k, num_iterations=200)
    torch.testing.assert_close(gates, soft_topk(logits, 27), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_iterations", [1, 7, 50])
@pytest.mark.parametrize(("eps_init", "eps_decay"), [(4.0, 0.7), (0.5, 0.9), (10.0, 0.5)])
def test_equals_the_package_under_any_epsilon_schedule(num_iterations, eps_init, eps_decay):
    """In float64; in float32 within twice the package's own error."""
    logits = (
        torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    )
    schedule = {"eps": 0.3, "eps_init": eps_init, "eps_decay": eps_decay}

    def run(ours: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        s = logits.to(dtype, copy=True).requires_grad_()
        if ours:
            k = torch.full((64, 1), 9.0, dtype=dtype)
            gates = coordinate_descent(s, k, num_iterations=num_iterations, **schedule)
        else:
            gates = coor_descent(s, n_iters=num_iterations, k=9.0, **schedule)
        (gates * logits).sum().backward()
        return gates.detach().double(), s.grad.double()

    exact = run(False, torch.float64)
    torch.testing.assert_close(run(True, torch.float64), exact, rtol=1e-11, atol=1e-11)
    parts = zip(run(True, torch.float32), run(False, torch.float32), exact, strict=True)
    for ours, theirs, truth in parts:
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-7
