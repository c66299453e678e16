"""The routing kernel: selection, gates and gradient, in the interpreter and on a GPU."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from routedvit.layers import RoutedBlock
from routedvit.ops import SAVED_OPS, route, route_all, routing_triton, select, set_backend
from routedvit.ops.row_tiles_triton import MAX_BLOCK
from routedvit.ops.soft_topk import soft_topk
from tests.unit.ops.comparing import assert_as_exact_as_the_reference, draw

CASES = [(1, 1), (2, 1), (7, 1), (7, 3), (49, 12), (49, 48), (49, 49), (577, 100), (1025, 257)]
LONG = 2 * MAX_BLOCK + 17  # three blocks, the last one nearly empty


def gates_of(k: int, fetch_ratio: float = 1.125, eps: float = 1.0):
    return lambda logits: route(logits, k, fetch_ratio, eps)[1]


@pytest.mark.parametrize(("n", "k"), CASES)
def test_selection_is_a_loop_over_rows_and_gates_obey_their_definition(n, k, device):
    logits = draw(2, 2, n)
    indices, gates = route(logits.to(device), k)
    for image in range(2):
        for r in range(2):
            row = logits[image, r].tolist()
            assert indices[image, r].tolist() == sorted(sorted(range(n), key=lambda i: -row[i])[:k])
    exact = soft_topk(logits.double(), min(k * 1.125, n)).gather(-1, indices.cpu())
    torch.testing.assert_close(gates.cpu().double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 27.0, 100.0, 1e4])
@pytest.mark.parametrize(("n", "k"), [(196, 1), (196, 49), (196, 195)])
def test_all_gates_sum_to_k_and_are_monotone_at_any_spread(n, k, spread, device):
    logits = (draw(3, 1, n) * spread).to(device)
    _, indices, gates = routing_triton.route(logits, [k], 1.125, 1.0)
    target = min(k * 1.125, n)
    assert ((gates.double().sum(-1) - target).abs() <= 1e-5 * target).all()
    assert (gates.gather(-1, logits.argsort(-1)).diff(dim=-1) >= 0).all()
    assert torch.equal(indices, logits.topk(k).indices.sort(-1).values.squeeze(1))


@pytest.mark.parametrize("spread", [0.3, 1.0, 5.0, 27.0])
@pytest.mark.parametrize(("n", "k"), CASES)
def test_gates_and_gradient_are_as_exact_as_the_reference(n, k, spread, device):
    assert_as_exact_as_the_reference(gates_of(k), draw(2, n) * spread, device=device)
    assert_as_exact_as_the_reference(gates_of(k, 1.0, 0.5), draw(2, n) * spread, device=device)


@pytest.mark.parametrize("n", [LONG, 65536])
def test_rows_of_several_blocks(n, device):
    k = n // 3
    assert_as_exact_as_the_reference(gates_of(k), draw(1, n) * 3, device=device)
    scores = draw(1, n).to(device)
    assert torch.equal(select(scores, k), scores.topk(k).indices.sort(-1).values)


@pytest.mark.parametrize("n", [16, LONG])
def test_of_equal_scores_the_lowest_index_wins(n, device):
    k = n // 2
    for function in (lambda s: route(s, k)[0], lambda s: select(s, k)):
        assert function(torch.zeros(1, n, device=device))[0].tolist() == list(range(k))
        scores = torch.zeros(1, n, device=device)
        scores[0, ::3] *= -1.0  # -0 equals 0
        scores[0, -1], scores[0, 1] = 5, -5
        assert function(scores)[0].tolist() == [0, *range(2, k), n - 1]


def test_every_step_of_the_threshold_search_ends_on_hostile_rows(device):
    n = 200
    rows = torch.stack([
        torch.arange(n) * 50.0,  # saturates a few entries per Newton step
        -torch.logspace(-38, 38, n),  # keys spread over all exponents
        torch.logspace(-45, 30, n).sign() * torch.logspace(-45, 30, n),  # subnormal to huge
        torch.cat([torch.full((n - 1,), 1.0), torch.tensor([3e38])]),
        torch.nextafter(torch.ones(n), torch.arange(n) % 2 * 2.0),  # neighbouring floats
    ])  # fmt: skip
    for k in (1, 50, 199):
        indices, gates = route(rows.to(device), k)
        exact = soft_topk(rows.double(), min(k * 1.125, n)).gather(-1, indices.cpu())
        torch.testing.assert_close(gates.cpu().double(), exact, rtol=1e-4, atol=1e-6)
        largest = rows.topk(k).values.sort(-1).values
        assert torch.equal(rows.gather(-1, indices.cpu()).sort(-1).values, largest)


def test_minus_infinity_is_chosen_last_with_gate_0_and_nan_is_not_hidden(device):
    logits = draw(2, 9)
    logits[0, 2:] = -math.inf
    logits[1, 4] = math.nan
    indices, gates = route(logits.to(device), 4)
    assert indices[0].tolist() == [0, 1, 2, 3]
    assert gates[0].tolist() == [1, 1, 0, 0]
    assert gates[1].isnan().any()
    assert 4 in indices[1]
    assert len(set(indices[1].tolist())) == 4


def test_routers_with_different_k_share_a_launch(device, monkeypatch):
    launches = []
    launch = routing_triton.routing_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return launch[grid]

    monkeypatch.setattr(routing_triton, "routing_kernel", Counted())
    logits, counts = draw(3, 4, 49).to(device), [12, 1, 49, 12]
    together = route_all(logits, counts)
    assert launches == [(12,)]
    for r, (indices, gates) in enumerate(together):
        alone = route(logits[:, r], counts[r])
        assert torch.equal(indices, alone[0])
        assert torch.equal(gates, alone[1])
    assert_as_exact_as_the_reference(
        lambda s: torch.cat([gates for _, gates in route_all(s, counts)], -1),
        logits,
        device=device,
    )


def test_inputs_may_be_strided_and_are_left_alone(device):
    logits = draw(49, 6).to(device)
    before = logits.clone()
    strided, plain = route(logits.t(), 12), route(logits.t().contiguous(), 12)
    assert torch.equal(strided[0], plain[0])
    assert torch.equal(strided[1], plain[1])
    assert torch.equal(logits, before)


def test_low_precision_scores_are_selected_in_float32(device):
    scores = draw(2, 50).to(device, torch.bfloat16)
    assert torch.equal(select(scores, 9), select(scores.float(), 9))
    assert select(scores, 0).shape == (2, 0)


def test_operators_are_registered_soundly(device):
    logits = draw(2, 2, 10).to(device).requires_grad_()
    torch.library.opcheck(SAVED_OPS[0], (logits, [3, 5], 1.125, 1.0))
    torch.library.opcheck(SAVED_OPS[1], (logits.detach(), 3))
    gates, indices, full = SAVED_OPS[0](logits.detach(), [3, 5], 1.125, 1.0)
    backward = torch.ops.routedvit.route_backward.default
    torch.library.opcheck(backward, (indices, full, gates, [3, 5], 1.0))


@pytest.mark.parametrize("policy", ["none", "heavy", "block"])
def test_a_block_has_the_gradients_of_the_reference_also_compiled_and_recomputed(policy, device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = RoutedBlock(32, 4, light_window=3, num_prefix=1, kv_routes=2).to(device)
    model.set_checkpointing(policy)
    x = draw(2, 37, 32).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    gradients = []
    for name, function in (("torch", model), ("triton", model), ("triton", compiled)):
        set_backend(name)
        model.zero_grad()
        function(x, (6, 6)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1
