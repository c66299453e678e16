"""What compiled code on a GPU indexes, against the reference; in Triton's interpreter elsewhere."""

import pytest
import torch
from torch import Tensor

from routedvit.ops import (
    gather_all,
    gather_norm_all,
    gather_tokens,
    router_logits,
    scatter_add_tokens,
    settle_gradient,
)
from routedvit.ops.backend import backend
from routedvit.ops.token_operators import token_rows
from tests.unit.ops.comparing import assert_as_exact_as_the_reference, draw
from tests.unit.ops.test_tokens_triton import LOW, choose

SIZES = [(1, 1, 8), (7, 7, 48), (50, 12, 384)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    """Compiled for the backend under test, plain for its reference."""
    for_triton = torch.compile(function, fullgraph=True, backend="aot_eager")

    def call(*inputs: Tensor) -> Tensor:
        return (for_triton if backend() == "triton" else function)(*inputs)

    return call


def operators_of(function, *inputs: Tensor) -> set[str]:
    """The operators in the graph of a function."""
    seen: set[str] = set()

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                seen.update(str(node.target) for node in module.graph.nodes)
        return graph

    torch.compile(function, fullgraph=True, backend=compiler)(*inputs)
    return seen


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("n", "k", "dim"), SIZES)
def test_what_was_gathered_and_its_gradients(n, k, dim, dtype, device):
    one, several = choose(k, n, 2).to(device), choose(k, n, 2, 3).to(device)

    @compiled
    def everything(x: Tensor) -> Tensor:
        x, rows = gather_all(x, [one, several])
        alone = gather_tokens(x, one)
        return torch.cat([x * 2, rows[0] * 3, alone * 5, *(rows[1] * 4).unbind(1)], 1)

    assert_as_exact_as_the_reference(everything, draw(2, n, dim).to(dtype), device=device)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("residual", [None, "same", torch.float32])
@pytest.mark.parametrize(("n", "k", "dim"), SIZES)
def test_scatter_and_all_its_gradients(n, k, dim, dtype, residual, device):
    index = choose(k, n, 2).to(device)
    inputs = [draw(2, n, dim).to(dtype), draw(2, k, dim, seed=1).to(dtype), draw(2, k).sigmoid()]
    if residual is not None:
        inputs.append(draw(2, n, dim, seed=2).to(dtype if residual == "same" else residual))

    @compiled
    def scatter(base: Tensor, rows: Tensor, gate: Tensor, *rest: Tensor) -> Tensor:
        return scatter_add_tokens(base, index, rows, gate, *rest)

    assert_as_exact_as_the_reference(scatter, *inputs, device=device)


@pytest.mark.parametrize("rms", [False, True])
def test_a_norm_of_the_rows(rms, device):
    index = choose(5, 9, 2).to(device)

    @compiled
    def normal_rows(x: Tensor, weight: Tensor) -> Tensor:
        return gather_norm_all(x, [index], weight, None, 1e-6, rms=rms)[1][0]

    assert_as_exact_as_the_reference(normal_rows, draw(2, 9, 48), draw(48), device=device)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("num_prefix", [0, 3])
def test_scores_of_several_routes(num_prefix, dtype, device):
    @compiled
    def scores(x: Tensor, weight: Tensor) -> Tensor:
        return router_logits(settle_gradient(x), weight, 0.5, num_prefix)

    assert_as_exact_as_the_reference(
        scores, draw(2, 9, 48).to(dtype), draw(2, 48).to(dtype), device=device
    )


def test_each_token_knows_as_which_row_a_route_took_it(device):
    index = choose(4, 300, 3, 2).to(device)
    found = token_rows(index, 300)
    expected = torch.full((3, 2, 300), -1)
    for image in range(3):
        for route in range(2):
            for row, token in enumerate(index[image, route].tolist()):
                expected[image, route, token] = row
    assert torch.equal(found.cpu(), expected)


def test_rows_that_nobody_took_may_hold_anything(device):
    index = choose(2, 6, 1).to(device)
    rows = torch.full((1, 2, 4), torch.inf, device=device)
    gate = torch.ones(1, 2, device=device)
    base = torch.zeros(1, 6, 4, device=device)
    out = compiled(scatter_add_tokens)(base, index, rows, gate)
    assert int(out.isfinite().all(-1).sum()) == 4


def test_compiled_code_calls_no_kernel_that_the_compiler_could_not_fuse(device):
    index = choose(3, 7, 2).to(device)

    def sublayer(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        tokens = settle_gradient(x * 2)
        scores = router_logits(tokens, weight, 1.0, 0)
        tokens, rows = gather_all(tokens, [index])
        return scatter_add_tokens(tokens, index, rows[0], gate) + scores.mean()

    inputs = [t.to(device).requires_grad_() for t in (draw(2, 7, 8), draw(1, 8), draw(2, 3))]
    ours = {name for name in operators_of(sublayer, *inputs) if "routedvit" in name}
    assert {name.split(".")[1] for name in ours} <= {"token_rows", "settle"}


def test_operators_are_registered_soundly(device):
    ops = torch.ops.routedvit
    torch.library.opcheck(ops.token_rows.default, (choose(3, 7, 2, 2).to(device), 7))
    torch.library.opcheck(ops.settle.default, (draw(2, 7, 8).to(device),))
