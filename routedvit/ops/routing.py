"""Routing decisions: which k tokens of every row go heavy, and with which gate.

`route` is an operator of its own (`torch.ops.routedvit.route`, with a fake and a backward) for
three reasons: activation checkpointing can name it and keep its outputs, so that a recompute never
routes again; its backward is the closed form on the saved gates, without the graph of the solver;
and a Triton kernel can take its place behind the same signature. Export and TorchScript see the
plain PyTorch below it, which any runtime understands.

`select` is the same for scores whose gates come from elsewhere (coordinate descent, ablations).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from routedvit.ops.backend import plain_pytorch, uses_triton
from routedvit.ops.soft_topk import TINY, capped_softmax, gates_gradient
from routedvit.ops.sorted_routing import route_rows

__all__ = ["SAVED_OPS", "route", "route_all", "route_reference", "select", "select_reference"]


def select_reference(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] int64 of the k largest of the last dimension of scores, ascending."""
    return scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def route_reference(
    logits: Tensor, k: int, fetch_ratio: float, eps: float
) -> tuple[Tensor, Tensor]:
    """`route` in plain differentiable PyTorch, with sizes that may be symbolic."""
    n = logits.shape[-1]
    target = (torch.full_like(logits[..., :1], k) * fetch_ratio).clamp(max=n)
    top, order = logits.detach().topk(n, dim=-1)
    indices = order[..., :k].sort(dim=-1).values
    return indices, capped_softmax(logits, top, target, eps).gather(-1, indices)


def route(
    logits: Tensor, k: int, fetch_ratio: float = 1.125, eps: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Select k tokens per row and weigh them with the exact soft top-k.

    Args:
        logits: [..., n] float32.
        k: tokens to select, 1 <= k <= n.
        fetch_ratio: the gates of a row sum to min(k * fetch_ratio, n) over all n tokens. The
            paper's 9/8 leaves weight, and with it gradient, to the tokens that just missed the
            selection.
        eps: temperature of the gates.

    Returns:
        indices [..., k] int64 ascending (not differentiable) and the gates [..., k] of these
        tokens.
    """
    if torch.jit.is_scripting():
        return route_reference(logits, k, fetch_ratio, eps)
    if plain_pytorch():
        return route_reference(logits, k, fetch_ratio, eps)
    gates, indices, _ = torch.ops.routedvit.route(logits.unsqueeze(-2), [k], fetch_ratio, eps)
    return indices, gates


def route_all(
    logits: Tensor, counts: Sequence[int], fetch_ratio: float = 1.125, eps: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """`route` for R routers at once, each with a k of its own: one kernel launch on a GPU.

    Args:
        logits: [..., R, n] float32.
        counts: the R numbers of tokens to select.
        fetch_ratio, eps: as in `route`.

    Returns:
        indices [..., k] and gates [..., k] of each router.
    """
    gates, indices, _ = torch.ops.routedvit.route(logits, counts, fetch_ratio, eps)
    return list(zip(indices.split(counts, -1), gates.split(counts, -1), strict=True))


def select(scores: Tensor, k: int) -> Tensor:
    """`select_reference` as an operator that activation checkpointing can name."""
    if torch.jit.is_scripting():
        return select_reference(scores, k)
    if plain_pytorch():
        return select_reference(scores, k)
    return torch.ops.routedvit.select(scores.detach(), k)


@torch.library.custom_op("routedvit::route", mutates_args=())
def _route(
    logits: Tensor, counts: Sequence[int], fetch_ratio: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., R, n] -> gates and indices of the selected [..., sum(counts)], all gates."""
    if uses_triton(logits):
        from routedvit.ops import routing_triton

        return routing_triton.route(logits, counts, fetch_ratio, eps)
    logits = logits.contiguous()  # so that the outputs are, as announced by the fake
    if len(counts) == 1:
        gates, indices, all_gates = _route_one(logits.squeeze(-2), counts[0], fetch_ratio, eps)
        return gates, indices, all_gates.unsqueeze(-2)
    routes = [
        _route_one(row, k, fetch_ratio, eps)
        for row, k in zip(logits.unbind(-2), counts, strict=True)
    ]
    picked, chosen, full = (list(part) for part in zip(*routes, strict=True))
    return torch.cat(picked, -1), torch.cat(chosen, -1), torch.stack(full, -2)


def _route_one(
    logits: Tensor, k: int, fetch_ratio: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = logits.shape[-1]
    target = min(k * fetch_ratio, n)
    if logits.device.type == "cpu" and target < n and logits.numel() > 0:
        routed = route_rows(logits.reshape(-1, n), k, target, eps)
        if routed is not None:
            gates, indices, all_gates = (part.view(*logits.shape[:-1], -1) for part in routed)
            return gates, indices, all_gates
    # one sorted top-k serves the gates and, its first k, the selection
    top, order = logits.topk(math.ceil(target), dim=-1)
    indices = order[..., :k].sort(dim=-1).values
    all_gates = capped_softmax(logits, top, torch.full_like(logits[..., :1], target), eps)
    return all_gates.gather(-1, indices), indices, all_gates


@_route.register_fake
def _(
    logits: Tensor, counts: Sequence[int], fetch_ratio: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*logits.shape[:-2], sum(counts))
    return (
        logits.new_empty(shape),
        logits.new_empty(shape, dtype=torch.long),
        logits.new_empty(logits.shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, indices, all_gates = output
    ctx.save_for_backward(indices, all_gates)
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)  # of outputs that nobody used
    ctx.counts, ctx.eps = inputs[1], inputs[3]


def _route_backward(
    ctx: Any, grad_selected: Tensor | None, _: None, grad_all: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    if grad_selected is None and grad_all is None:
        return None, None, None, None
    indices, gates = ctx.saved_tensors
    if grad_all is not None or torch.is_grad_enabled():
        # create_graph=True: this gradient depends on all gates, and they on the logits
        total = torch.zeros_like(gates) if grad_all is None else grad_all
        if grad_selected is not None:
            flat = total.flatten(-2)
            places = _places(indices, gates.shape[-1], ctx.counts)
            total = flat.scatter_add(-1, places, grad_selected).view_as(gates)
        return gates_gradient(gates, total, ctx.eps)[0], None, None, None
    grad = torch.ops.routedvit.route_backward(indices, gates, grad_selected, ctx.counts, ctx.eps)
    return grad, None, None, None


def _places(indices: Tensor, n: int, counts: Sequence[int]) -> Tensor:
    """Indices [..., sum(counts)] within the routes -> within their R * n tokens."""
    if len(counts) == 1:
        return indices
    of_route = indices.split(list(counts), -1)
    return torch.cat([own + r * n for r, own in enumerate(of_route)], -1)


@torch.library.custom_op("routedvit::route_backward", mutates_args=())
def _route_gradient(
    indices: Tensor, gates: Tensor, grad: Tensor, counts: Sequence[int], eps: float
) -> Tensor:
    """Gradient of the logits from that of the picked gates; shapes as `_route` has them.

    ds_i = gate_i / eps * (g_i - sum_U g * gate / sum_U gate) on U = {gate < 1}, else 0
    """
    if uses_triton(gates):
        from routedvit.ops import routing_triton

        return routing_triton.route_backward(indices, gates, grad, counts, eps)
    indices = _places(indices, gates.shape[-1], counts)
    free = gates.frac()  # a saturated 1 becomes 0
    weighted = free.flatten(-2).gather(-1, indices) * grad
    out = torch.zeros_like(free).flatten(-2).scatter_(-1, indices, weighted).view_as(free)
    mean = out.sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp_(min=TINY)
    return out.addcmul_(free, mean, value=-1).div_(eps)


@_route_gradient.register_fake
def _(indices: Tensor, gates: Tensor, grad: Tensor, counts: Sequence[int], eps: float) -> Tensor:
    return torch.empty_like(gates)


_route.register_autograd(_route_backward, setup_context=_save_for_backward)


@torch.library.custom_op("routedvit::select", mutates_args=())
def _select(scores: Tensor, k: int) -> Tensor:
    if uses_triton(scores):
        from routedvit.ops import routing_triton

        return routing_triton.select(scores, k)
    return select_reference(scores.contiguous(), k)


@_select.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.long)


# what a recompute must take from the forward pass instead of deciding again
SAVED_OPS = (torch.ops.routedvit.route.default, torch.ops.routedvit.select.default)
