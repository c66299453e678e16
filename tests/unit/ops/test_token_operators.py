"""The operators of gather and scatter on a CPU: registered soundly, equal to the plain indexing."""

import pytest
import torch
from torch import Tensor

from routedvit.ops import gather_tokens, scatter_add_tokens
from tests.unit.ops.test_tokens_triton import choose, draw

INDEX = choose(3, 7, 2, 2)


def gather_and_scatter(x: Tensor, rows: Tensor, gate: Tensor, residual: Tensor | None) -> Tensor:
    taken = gather_tokens(x, INDEX)
    return scatter_add_tokens(x, INDEX[:, 0], rows + taken.sum(1), gate, residual)


@pytest.mark.parametrize("with_residual", [False, True])
def test_compiled_equals_eager_in_value_and_gradients(with_residual):
    results = []
    for function in (gather_and_scatter, torch.compile(gather_and_scatter, fullgraph=True)):
        shapes = [(2, 7, 8), (2, 3, 8), (2, 3), (2, 7, 8)]
        leaves = [draw(*shape).requires_grad_() for shape in shapes]
        used = leaves if with_residual else [*leaves[:3], None]
        out = function(*used)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(results[0]) == 4 + with_residual
    torch.testing.assert_close(*results)


def test_compiled_code_calls_the_operators():
    seen = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(gather_and_scatter, backend=backend, fullgraph=True)
    compiled(draw(2, 7, 8), draw(2, 3, 8), draw(2, 3), None)
    assert {"routedvit.gather_tokens", "routedvit.scatter_add_tokens"} <= {*seen}


def test_operators_are_registered_soundly():
    ops = torch.ops.routedvit
    x, index = draw(2, 7, 8).requires_grad_(), INDEX
    rows, gate = draw(2, 3, 8).requires_grad_(), draw(2, 3).requires_grad_()
    torch.library.opcheck(ops.gather_tokens.default, (x, index))
    torch.library.opcheck(ops.gather_tokens_backward.default, (index, draw(2, 2, 3, 8), 7))
    for residual in (None, x.detach().clone().requires_grad_()):
        torch.library.opcheck(
            ops.scatter_add_tokens.default, (x, index[:, 0], rows, gate, residual)
        )
    torch.library.opcheck(
        ops.scatter_add_tokens_backward.default,
        (index[:, 0], rows.detach(), gate.detach(), x.detach()),
    )
