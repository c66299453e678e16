"""Activation checkpointing that never routes twice.

Under plain checkpointing a recompute selects its tokens again. Near ties can then fall the other
way, shapes still agree, and gradients silently belong to other tokens. Here the routing operators
(`routedvit.ops.SAVED_OPS`) are the one thing a checkpointed block keeps besides its input: their
outputs, indices and gates, come from the forward pass, everything else is recomputed. This is
PyTorch's selective checkpointing, so torch.compile honours it too.

With `check_routing` the recompute does route again and compares: a test of the hardware and of
this promise.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

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
            otherwise.
    """
    context = _checked_routing if check_routing else _keep_routing
    return checkpoint(function, *args, use_reentrant=False, context_fn=context)


def recompute(function: Callable[..., T], *args: Any) -> T:
    """Plain checkpointing, for a function that does not route."""
    return checkpoint(function, *args, use_reentrant=False)


def _checked_routing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    decisions: list[tuple[Tensor, ...]] = []
    return _Record(decisions), _Compare(decisions)


class _Record(TorchDispatchMode):
    """Keeps what the routing operators return."""

    def __init__(self, decisions: list[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.decisions = decisions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in SAVED_OPS:
            self.decisions.append(output if isinstance(output, tuple) else (output,))
        return output


class _Compare(TorchDispatchMode):
    """Routes again and insists on the same indices."""

    def __init__(self, decisions: list[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.decisions = decisions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in SAVED_OPS:
            again = output if isinstance(output, tuple) else (output,)
            for before, now in zip(self.decisions.pop(0), again, strict=True):
                if not before.is_floating_point() and not torch.equal(before, now):
                    moved = (before != now).sum().item()
                    raise RuntimeError(
                        f"the recompute routed {moved} of {now.numel()} tokens otherwise than the"
                        " forward pass: this block does not compute the same thing twice; without"
                        " check_routing the indices of the forward pass are kept"
                    )
        return output
