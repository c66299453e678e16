"""Routing from sorted bare values agrees with the solver on sorted pairs, or declines."""

import pytest
import torch
from torch import Tensor

from routedvit.ops import route
from routedvit.ops.soft_topk import soft_topk
from routedvit.ops.sorted_routing import route_rows


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 27.0, 1e4])
@pytest.mark.parametrize(
    ("n", "k", "target"),
    [
        *((2, 1, 1.0), (7, 1, 1.5), (196, 49, 55.125), (196, 195, 195.5)),
        *((2048, 1, 1.0), (2048, 512, 576.0), (1025, 1024, 1024.5)),  # only the largest are sorted
    ],
)
def test_equals_the_soft_topk_and_the_largest(n, k, target, spread):
    logits = draw(5, n) * spread
    routed = route_rows(logits, k, target, 0.7)
    assert routed is not None
    gates, indices, all_gates = routed
    assert torch.equal(indices, logits.topk(k).indices.sort(-1).values)
    exact = soft_topk(logits.double(), target, eps=0.7)
    rtol = 1e-5 + 1e-7 * spread  # a score is divided by eps in float32
    torch.testing.assert_close(all_gates.double(), exact, rtol=rtol, atol=1e-7)
    assert torch.equal(gates, all_gates.gather(-1, indices))


def test_float64_is_exact_where_float32_cannot_hold_the_target():
    logits = draw(3, 96).double() * 5
    routed = route_rows(logits, 24, 24 * 1.1, 1.0)
    assert routed is not None
    torch.testing.assert_close(routed[2], soft_topk(logits, 24 * 1.1), rtol=1e-12, atol=1e-14)


def test_a_row_whose_selection_is_open_is_declined():
    logits = draw(3, 16)
    assert route_rows(logits, 4, 4.5, 1.0) is not None
    for value in (float("nan"), float(logits[1].topk(5).values[4])):
        unclear = logits.clone()
        unclear[1, logits[1].argmax()] = value  # NaN, or a tie of the fourth with the fifth
        assert route_rows(unclear, 4, 4.5, 1.0) is None


@pytest.mark.parametrize("n", [16, 2048])
def test_the_tokens_that_a_nan_leaves_out_are_not_made_up_for_by_a_tie(n):
    logits = draw(2, n)
    logits[0, 3] = float("nan")
    logits[1, :2] = logits[1].max() + 1
    assert int((logits >= torch.stack([logits[0, 3], logits[1, 0]]).unsqueeze(1)).sum()) == 2
    assert route_rows(logits, 1, 1.5, 1.0) is None
    indices, _ = route(logits, 1)
    assert indices.tolist() in ([[3], [0]], [[3], [1]])


def test_route_answers_where_it_declines():
    indices, gates = route(torch.zeros(2, 16), 4)
    assert indices.shape == gates.shape == (2, 4)
    assert gates.unique().tolist() == pytest.approx([4.5 / 16])
