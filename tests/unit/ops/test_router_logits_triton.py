"""The kernel of the scores: values, and the gradients of tokens and vectors."""

import pytest
import torch

from routedvit.ops import router_logits, router_logits_triton
from tests.unit.ops.comparing import assert_as_exact_as_the_reference, draw
from tests.unit.ops.test_tokens_triton import LOW


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("batch", "n", "prefix", "routes", "dim"),
    [(1, 1, 0, 1, 8), (2, 7, 1, 1, 48), (3, 40, 4, 2, 384), (2, 5, 0, 3, 768), (2, 9, 0, 1, 20)],
)
def test_as_exact_as_the_reference(batch, n, prefix, routes, dim, dtype, device):
    assert_as_exact_as_the_reference(
        lambda x, weight: router_logits(x, weight, dim**-0.5, prefix),
        draw(batch, prefix + n, dim).to(dtype),
        draw(routes, dim).to(dtype),
        device=device,
    )


def test_gradients_are_complete_when_programs_walk_over_many_tokens(device, monkeypatch):
    monkeypatch.setattr(router_logits_triton, "MAX_PROGRAMS", 3)
    assert_as_exact_as_the_reference(
        lambda x, weight: router_logits(x, weight, 0.1, 2),
        draw(2, 302, 384),
        draw(2, 384),
        device=device,
    )


def test_tokens_and_vectors_may_differ_in_type_and_be_strided(device):
    x, weight = draw(48, 7, 2).to(device).permute(2, 1, 0), draw(48, 2).to(device).t()
    expected = torch.einsum("bnd,rd->brn", x[:, 1:].double(), weight.bfloat16().double()) * 0.5
    found = router_logits(x, weight.bfloat16(), 0.5, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous()


def test_prefix_tokens_are_neither_scored_nor_read(device):
    x = draw(2, 7, 48).to(device)
    x[:, :2] = torch.inf
    x.requires_grad_()
    weight = draw(1, 48).to(device).requires_grad_()
    router_logits(x, weight, 0.5, 2).square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert not x.grad[:, :2].any()
    assert x.grad[:, 2:].all()


def test_no_images_give_no_scores(device):
    x = torch.zeros(0, 5, 8, device=device, requires_grad=True)
    weight = draw(1, 8).to(device).requires_grad_()
    router_logits(x, weight, 1.0, 1).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_no_copy_of_the_tokens_is_kept(device):
    x, weight = draw(2, 7, 48).to(device).bfloat16(), draw(1, 48).to(device).bfloat16()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        router_logits(x.requires_grad_(), weight.requires_grad_(), 0.5, 1)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


def test_operators_are_registered_soundly(device):
    ops = torch.ops.routedvit
    x, weight = draw(2, 7, 8).to(device), draw(2, 8).to(device)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(ops.router_logits.default, (*leaves, 0.5, 1))
    grad = draw(2, 2, 6).to(device)
    arguments = (x.detach(), weight.detach(), grad, 0.5, 1)
    torch.library.opcheck(ops.router_logits_backward.default, arguments)
