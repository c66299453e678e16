"""Activation checkpointing that never routes twice.

Under plain checkpointing a recompute selects its tokens again. Near ties can then fall the other
way, shapes still agree, and gradients silently belong to other tokens. Here the routing operators
(`routedvit.ops.SAVED_OPS`) are the one thing a checkpointed block keeps besides its input: their
outputs, indices and gates, come from the forward pass, everything else is recomputed.

PyTorch's selective checkpointing does that for one backward pass, and torch.compile knows it. In
eager mode two small dispatch modes do it for any number (`retain_graph`, second derivatives). With
`check_routing` the recompute does route again and compares: a test of the hardware and of this
promise.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from routedvit.ops import SAVED_OPS

__all__ = ["POLICIES", "checkpoint_routed", "recompute"]

T = TypeVar("T")
POLICIES = ("none", "heavy", "block")

_keep_routing = partial(create_selective_checkpoint_contexts, list(SAVED_OPS))


def checkpoint_routed(
    function: Callable[..., Tensor], *args: Any, check_routing: bool = False
) -> Tensor:
    """function(*args), recomputed in the backward pass with the routing of the forward pass.

    Raises:
        RuntimeError: in the backward pass, if check_routing is set and the recompute would route
            otherwise; or if a decision was written to in place.
    """
    if torch.compiler.is_compiling() and not check_routing:
        context: Callable[[], Any] = _keep_routing
    else:
        context = partial(_repeat_routing, check_routing)
    return checkpoint(function, *args, use_reentrant=False, context_fn=context)


def recompute(function: Callable[..., T], *args: Any) -> T:
    """Plain checkpointing, for a function that does not route."""
    return checkpoint(function, *args, use_reentrant=False)


def _repeat_routing(check: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    decisions: list[_Decision] = []
    return _Record(decisions), _Repeat(decisions, check)


class _Decision:
    """The outputs of a routing operator, kept outside of any graph."""

    def __init__(self, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        self.is_tuple = isinstance(output, tuple)
        # below autograd, where this runs, an alias would have a version counter of its own
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensors = [x.detach() for x in outputs]
        self.versions = [x._version for x in self.tensors]

    def output(self) -> Tensor | tuple[Tensor, ...]:
        """As often as it is asked for, since each recompute gives its own a graph."""
        if [x._version for x in self.tensors] != self.versions:
            raise RuntimeError(
                "what a router decided was written to in place; a recompute would write to it again"
            )
        again = tuple(x.detach() for x in self.tensors)
        return again if self.is_tuple else again[0]

    def compare(self, output: Tensor | tuple[Tensor, ...]) -> None:
        again = output if isinstance(output, tuple) else (output,)
        for before, now in zip(self.tensors, again, strict=True):
            if not before.is_floating_point() and not torch.equal(before, now):
                moved = (before != now).sum().item()
                raise RuntimeError(
                    f"the recompute routed {moved} of {now.numel()} tokens otherwise than the"
                    " forward pass: this block does not compute the same thing twice; without"
                    " check_routing the indices of the forward pass are kept"
                )


class _Record(TorchDispatchMode):
    """Keeps what the routing operators return."""

    def __init__(self, decisions: list[_Decision]) -> None:
        super().__init__()
        self.decisions = decisions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in SAVED_OPS:
            self.decisions.append(_Decision(output))
        return output


class _Repeat(TorchDispatchMode):
    """Has the routing operators return that again; with `check`, insists that they would."""

    def __init__(self, decisions: list[_Decision], check: bool) -> None:
        super().__init__()
        self.decisions = decisions
        self.check = check

    def __enter__(self) -> Self:
        self.coming = iter(self.decisions)  # once for each backward pass
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in SAVED_OPS:
            return func(*args, **(kwargs or {}))
        decision = next(self.coming)
        if self.check:
            decision.compare(func(*args, **(kwargs or {})))
        return decision.output()
