"""A compiled model calls the kernels, in Triton's interpreter here, and has the eager gradients.

Whichever torch compiles: where it lost them, everything would still be right and slow.
"""

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import routedvit  # noqa: F401  registers the models
from routedvit.ops import set_backend

FORWARD, BACKWARD = {"route", "token_rows"}, {"route_backward", "settle"}
LOW_PRECISION = {"window_attention"}, {"window_attention_backward"}


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has it")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch._dynamo.reset()
    yield
    set_backend(None)
    torch._dynamo.reset()


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    forward(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("none", torch.float32), ("block", torch.float32), ("none", torch.bfloat16)],
)
def test_the_graphs_hold_the_operators_forward_and_backward(policy, dtype, interpreter):
    torch.manual_seed(0)
    model = timm.create_model("colt5_vit_test", img_size=28, patch_size=4).train().to(dtype)
    model.set_grad_checkpointing(policy=policy)
    x = torch.randn(2, 3, 28, 28, dtype=dtype)
    set_backend("torch")
    expected = gradients(model, model, x)
    set_backend("triton")
    called: list[set[str]] = [set(), set()]

    def compiler(which: int) -> Callable[..., torch.fx.GraphModule]:
        def compile_nothing(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
            for node in graph.graph.nodes:  # what writes to its input is an argument of another
                called[which] |= {str(node.target), *map(str, node.args[:1])}
            return graph

        return compile_nothing

    backend = aot_autograd(fw_compiler=compiler(0), bw_compiler=compiler(1))
    found = gradients(model, torch.compile(model, fullgraph=True, backend=backend), x)
    ours = [{n.split(".")[1] for n in names if n.startswith("routedvit.")} for names in called]
    low = dtype != torch.float32
    assert ours[0] == FORWARD | (LOW_PRECISION[0] if low else set())
    # token rows may be recomputed, routing never
    assert ours[1] - {"token_rows"} == BACKWARD | (LOW_PRECISION[1] if low else set())
    if low:  # tokens may be routed otherwise
        assert all(grad.isfinite().all() for grad in found)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
