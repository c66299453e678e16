"""Gradients that can be differentiated again, for operators whose own gradient cannot.

Gradient penalties, Hessian-vector products and the like call the backward pass with
`create_graph=True`; PyTorch then runs it with gradients enabled, and never else. An operator that
sees that in its backward pass computes its gradient anew, by the plain PyTorch it stands for.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["gradients_in_graph"]


def gradients_in_graph(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of `reference(*inputs)` for its inputs, None for those that need none.

    Args:
        reference: what the operator computes, in PyTorch that differentiates itself.
        inputs: the operator's own, from its saved tensors, with their place in the graph.
        grad: of the output.
    """
    needed = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(reference(*inputs), needed, grad, create_graph=True))
    return [next(found) if x.requires_grad else None for x in inputs]
