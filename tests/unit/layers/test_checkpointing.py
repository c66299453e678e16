"""A recompute never routes again, and gradients do not notice it."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.checkpointing import saved_activation_bytes
from routedvit.layers import RoutedBlock
from routedvit.ops import SAVED_OPS

GRID = (6, 6)
POLICIES = ["none", "heavy", "block"]


def block(**kwargs: object) -> RoutedBlock:
    torch.manual_seed(0)
    return RoutedBlock(32, 4, light_window=3, num_prefix=1, **kwargs).train()


def run(model: RoutedBlock, policy: str, **kwargs: bool) -> tuple[Tensor, list[Tensor]]:
    model.set_checkpointing(policy, **kwargs)
    model.zero_grad()
    x = torch.randn(3, 37, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)  # of drop-path and dropout
    out = model(x, GRID)
    out.square().sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in model.parameters())]


class CountRouting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in SAVED_OPS
        return func(*args, **(kwargs or {}))


OPTIONS = [
    {},
    {"drop_path": 0.5, "proj_drop": 0.2, "attn_drop": 0.2},
    {"drop_path": 0.5, "efficient_drop_path": True},
    {"router": "random"},
    {"router_kwargs": {"solver": "coordinate_descent", "straight_through": True}},
    {"kv_routes": 2, "null_token": True, "qk_norm": True},
]


@pytest.mark.parametrize("policy", ["heavy", "block"])
@pytest.mark.parametrize("kwargs", OPTIONS)
def test_gradients_are_bit_identical(kwargs, policy):
    model = block(**kwargs)
    plain, expected = run(model, "none")
    out, found = run(model, policy)
    assert torch.equal(plain, out)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_each_router_decides_once_per_step(policy):
    with CountRouting() as routing:
        run(block(), policy)
    assert routing.calls == 2  # q and kv together, ffn


def test_gradients_belong_to_the_tokens_of_the_forward_pass():
    """Even with a router turned round behind its back, the recompute keeps the first choice."""
    model = block()
    x = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for policy in ("none", "block"):
        model.set_checkpointing(policy)
        model.zero_grad()
        out = model(x.clone().requires_grad_(), GRID)
        with torch.no_grad():
            model.mlp.router.weight.neg_()
        out.square().sum().backward()
        with torch.no_grad():
            model.mlp.router.weight.neg_()
        found.append(model.mlp.heavy.fc1.weight.grad.clone())
    assert torch.equal(found[0], found[1])


def test_debug_switch_is_silent_when_all_is_well_and_changes_nothing():
    model = block()
    _, expected = run(model, "none")
    _, found = run(model, "block", check_routing=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_debug_switch_raises_when_the_recompute_would_route_otherwise():
    model = block()
    model.set_checkpointing("block", check_routing=True)
    out = model(torch.randn(2, 37, 32, requires_grad=True), GRID)
    with torch.no_grad():
        model.attn.q_router.weight.neg_()
    with pytest.raises(RuntimeError, match="otherwise than the forward pass"):
        out.sum().backward()


@pytest.mark.parametrize("check_routing", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_may_be_gone_through_again(policy, check_routing):
    """retain_graph=True, and create_graph=True for a penalty of the gradient."""
    model = block()
    x = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for own in ("none", policy):
        model.set_checkpointing(own, check_routing)
        model.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            loss = model(x, GRID).square().sum()
            loss.backward(retain_graph=True, inputs=list(model.parameters()))
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            slope.square().sum().backward(inputs=list(model.parameters()))
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_decision_that_a_hook_writes_to_is_not_written_to_twice():
    model = block()
    model.set_checkpointing("block")
    model.mlp.router.decision.register_forward_hook(
        lambda _, __, out: (*out[:1], out[1].mul_(0.5), *out[2:])
    )
    out = model(torch.randn(1, 37, 32, requires_grad=True), GRID)
    with pytest.raises(RuntimeError, match="written to in place"):
        out.sum().backward()


def test_policies_save_what_they_promise():
    model, x = block(), torch.randn(8, 37, 32, requires_grad=True)
    saved = {}
    for policy in POLICIES:
        model.set_checkpointing(policy)
        saved[policy] = saved_activation_bytes(model, x, GRID)
    assert 0 < saved["block"] < 0.1 * saved["none"]
    assert saved["block"] < saved["heavy"] < 0.8 * saved["none"]
