"""The kernel of attention in windows: values, and the gradients of queries, keys and values."""

import importlib

import pytest
import torch

from routedvit.ops.backend import uses_triton
from routedvit.ops.window_attention import window_attention, window_attention_reference
from tests.unit.ops.comparing import assert_as_exact_as_the_reference, draw
from tests.unit.ops.test_tokens_triton import LOW

SHAPES = [  # images, height, width, window, heads, head_dim, prefix
    (1, 1, 1, 1, 1, 16, 0),
    (2, 4, 4, 2, 2, 16, 1),
    (2, 14, 14, 7, 1, 64, 4),
    (2, 5, 8, 3, 3, 24, 5),  # padded both ways, a width that is no power of 2
    (1, 9, 3, 8, 1, 80, 0),  # one window is nearly all padding
    (1, 3, 3, 3, 2, 16, 20),  # more prefix tokens than a window has
]


def attend(qkv: torch.Tensor, *shape: int) -> torch.Tensor:
    """The kernel, of fp32 too, for which it is slow but more exactly told to be right."""
    if uses_triton(qkv):
        return torch.ops.routedvit.window_attention(qkv, *shape)
    return window_attention_reference(qkv, *shape)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_the_reference(shape, dtype, device):
    batch, height, width, window, heads, head_dim, prefix = shape
    assert_as_exact_as_the_reference(
        lambda qkv: attend(qkv, height, width, window, heads, prefix),
        draw(batch, prefix + height * width, 3 * heads * head_dim).to(dtype),
        device=device,
    )


def test_large_scores_are_exact_too(device):
    assert_as_exact_as_the_reference(
        lambda qkv: attend(qkv, 4, 4, 4, 1, 0), 20 * draw(2, 16, 48), device=device
    )


def test_strided_input(device):
    rows = draw(96, 18, 2).to(device).permute(2, 1, 0)
    expected = attend(rows.contiguous(), 4, 4, 2, 2, 2)
    assert torch.equal(attend(rows, 4, 4, 2, 2, 2), expected)
    wide = draw(2, 18, 100).to(device)[..., :96]
    expected = attend(wide.contiguous(), 4, 4, 2, 2, 2)
    assert torch.equal(attend(wide, 4, 4, 2, 2, 2), expected)


def test_what_is_not_finite_stays_in_its_window(device):
    qkv = draw(2, 3 + 16, 96).to(device)
    qkv[0, 3] = torch.nan  # the top left window of the first image
    qkv[1, 1] = torch.inf  # a prefix token; they are one window to the kernel
    out = attend(qkv.requires_grad_(), 4, 4, 2, 2, 3)
    out.square().sum().backward()
    spoilt = torch.zeros(2, 19, dtype=torch.bool, device=device)
    spoilt[0, [3, 4, 7, 8]] = True
    spoilt[1, :3] = True
    assert qkv.grad is not None
    for found in (out, qkv.grad):
        assert torch.equal(~found.isfinite().all(-1), spoilt)


def test_prefix_tokens_pass_their_value_on(device):
    qkv = draw(2, 5 + 9, 60).to(device).requires_grad_()
    out = attend(qkv, 3, 3, 2, 1, 5)
    assert torch.equal(out[:, :5], qkv[:, :5, 40:])
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert not grad[:, :5, :40].any()
    assert torch.equal(grad[:, :5, 40:], torch.ones(2, 5, 20, device=device))


def test_no_images(device):
    empty = torch.zeros(0, 18, 96, device=device, requires_grad=True)
    attend(empty, 4, 4, 2, 2, 2).sum().backward()
    assert empty.grad is not None


def test_what_the_kernel_does_not_take_is_computed_all_the_same(device):
    for qkv, shape in (
        (draw(1, 100, 48).bfloat16(), (10, 10, 10, 1, 0)),
        (draw(1, 70, 48).bfloat16(), (2, 2, 2, 1, 66)),
        (draw(1, 4, 3 * 160).bfloat16(), (2, 2, 2, 1, 0)),
        (draw(1, 4, 48), (2, 2, 2, 1, 0)),
    ):
        placed = qkv.to(device)
        expected = window_attention_reference(placed, *shape)
        assert torch.equal(window_attention(placed, *shape), expected)


def test_the_kernel_runs_where_it_may(device, monkeypatch):
    chooser = importlib.import_module("routedvit.ops.window_attention")
    monkeypatch.setattr(chooser, "window_attention_reference", None)
    window_attention(draw(1, 18, 96).bfloat16().to(device), 4, 4, 3, 2, 2)


def test_nothing_but_the_input_is_kept(device):
    qkv = draw(2, 18, 96).to(device).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(qkv, 4, 4, 2, 2, 2)
    assert {t.data_ptr() for t in kept} == {qkv.data_ptr()}


def test_a_second_derivative_is_that_of_the_reference(device):
    def penalty(qkv: torch.Tensor) -> torch.Tensor:
        out = attend(qkv, 4, 4, 2, 2, 2)
        (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        return grad.square().sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found, expected = (
            torch.autograd.grad(penalty(leaf), leaf)[0]
            for leaf in (
                draw(2, 18, 96).to(device).requires_grad_(),
                draw(2, 18, 96).to(device).double().requires_grad_(),
            )
        )
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_operators_are_registered_soundly(device):
    ops, shape = torch.ops.routedvit, (4, 4, 3, 2, 2)
    qkv = draw(2, 18, 96).to(device).requires_grad_()
    torch.library.opcheck(ops.window_attention.default, (qkv, *shape))
    grad = draw(2, 18, 32).to(device)
    torch.library.opcheck(ops.window_attention_backward.default, (qkv.detach(), grad, *shape))
