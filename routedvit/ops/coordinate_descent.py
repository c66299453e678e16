"""Soft top-k by coordinate descent with epsilon scaling, kept for compatibility.

The solver of CoLT5 and CoDA. Alternates between the two dual variables of the entropic programme
that `soft_topk` solves in closed form (Wright, arXiv 1502.04759; CoLT5, 2303.09752, appendix C),
while the temperature falls from `eps_init` to `eps` (Schmitzer, 1610.06519; CoDA, 2304.04947).
Gates and gradients are those of the PyPI package `colt5-attention` to rounding error. With logits
spread over more than about 2 eps, 20 steps do not converge: the sum overshoots k.

An operator, as `routedvit.ops.route` is, and for the same reasons. With s the logits and tau_t the
temperatures, step t takes the multiplier a_t of the sum; that of gate <= 1 is -relu(s + a_t), so

    l_1 = log n,   l_t = logsumexp(min(s, -a_{t-1}) / tau_t),   a_t = tau_t (log k - l_t)
    gates = exp(min(s + a_T, 0) / tau_{T+1})

and one scalar per step and row, l_t, is all that the backward pass needs. It takes all steps at
once: with p_t the softmax of step t, da_{t-1} = da_t * sum_{s > -a_{t-1}} p_t runs from the last
step to the first, and ds collects -da_t p_t over the entries with s <= -a_{t-1}.
"""

from typing import Any

import torch
from torch import Tensor

from routedvit.ops.backend import plain_pytorch, uses_triton
from routedvit.ops.double_backward import gradients_in_graph

__all__ = ["coordinate_descent", "coordinate_descent_reference"]


def coordinate_descent(
    logits: Tensor,
    k: Tensor,
    eps: float = 1.0,
    eps_init: float = 4.0,
    eps_decay: float = 0.7,
    num_iterations: int = 20,
    mask: Tensor | None = None,
) -> Tensor:
    """Approximate soft top-k of the last dimension.

    Args:
        logits: [..., n] float32 or float64.
        k: [..., 1], what each row should sum to.
        eps, eps_init, eps_decay: final and first temperature, and the factor from one step to the
            next.
        num_iterations: steps of coordinate descent.
        mask: [..., n] bool, True where an entry takes part.

    Returns:
        gates [..., n], 0 where masked.
    """
    if torch.jit.is_scripting():
        return coordinate_descent_reference(
            logits, k, eps, eps_init, eps_decay, num_iterations, mask
        )
    if plain_pytorch():
        return coordinate_descent_reference(
            logits, k, eps, eps_init, eps_decay, num_iterations, mask
        )
    mask = None if mask is None else mask.expand_as(logits)
    return torch.ops.routedvit.coordinate_descent(
        logits, k, mask, eps, eps_init, eps_decay, num_iterations
    )[0]


def coordinate_descent_reference(
    logits: Tensor,
    k: Tensor,
    eps: float,
    eps_init: float,
    eps_decay: float,
    num_iterations: int,
    mask: Tensor | None,
) -> Tensor:
    """`coordinate_descent` step for step as the package takes it, in PyTorch that differentiates
    itself.
    """
    # the most negative finite number rather than -inf: (-inf) - (-inf) would poison the first step
    lowest = -3.4e38  # of either type; TorchScript has no torch.finfo
    log_k = k.clamp(min=1e-20).log()
    if mask is not None:
        logits = logits.masked_fill(~mask, lowest)
    shift, excess = torch.zeros_like(k), -logits  # the multipliers of sum = k and of gate <= 1
    temperature = max(eps_init, eps)
    for _ in range(num_iterations):
        exponent = (logits + excess) / temperature
        if mask is not None:
            exponent = exponent.masked_fill(~mask, lowest)
        shift = temperature * (log_k - exponent.logsumexp(-1, keepdim=True))
        excess = -(logits + shift).relu()
        temperature = max(temperature * eps_decay, eps)
    gates = ((logits + shift + excess) / temperature).exp()
    return gates if mask is None else gates.masked_fill(~mask, 0.0)


def temperatures(eps: float, eps_init: float, eps_decay: float, num_iterations: int) -> list[float]:
    """tau_t of each step, then that of the gates."""
    schedule = [max(eps_init, eps)]
    for _ in range(num_iterations):
        schedule.append(max(schedule[-1] * eps_decay, eps))
    return schedule


@torch.library.custom_op("routedvit::coordinate_descent", mutates_args=())
def _descend(
    logits: Tensor,
    k: Tensor,
    mask: Tensor | None,
    eps: float,
    eps_init: float,
    eps_decay: float,
    num_iterations: int,
) -> tuple[Tensor, Tensor]:
    """logits [..., n], k [..., 1], bool mask [..., n] -> gates [..., n], sums l_t [..., T]."""
    schedule = (eps, eps_init, eps_decay, num_iterations)
    if uses_triton(logits):
        from routedvit.ops import coordinate_descent_triton

        return coordinate_descent_triton.coordinate_descent(logits, k, mask, *schedule)
    tau = temperatures(*schedule)
    scores = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    scores, log_k = scores.contiguous(), k.clamp(min=1e-20).log()
    # logsumexp by hand: it would search for the largest exponent in every step
    limit = torch.finfo(logits.dtype).max
    top = scores.amax(-1, keepdim=True).clamp_(-limit, limit)
    sums = torch.empty((num_iterations, *k.shape), dtype=k.dtype, device=k.device)
    sums[0] = scores.shape[-1] if mask is None else mask.sum(-1, keepdim=True)
    shift, exponent = tau[0] * (log_k - sums[0].log_()), torch.empty_like(scores)
    for temperature, total in zip(tau[1:-1], sums[1:], strict=True):
        cap = shift.neg_()
        largest = torch.minimum(top, cap)
        torch.minimum(scores, cap, out=exponent).sub_(largest).div_(temperature)
        exponent.clamp_(min=-80)  # beside the largest, 1: a CPU is slow at denormal numbers
        torch.sum(exponent.exp_(), -1, keepdim=True, out=total)
        total.log_().add_(largest.div_(temperature))
        torch.sub(log_k, total, out=shift).mul_(temperature)
    gates = torch.add(scores, shift, out=exponent).clamp_(max=0).div_(tau[-1]).exp_()
    if mask is not None:
        gates.masked_fill_(~mask, 0.0)  # also where a whole row is masked, and all above is NaN
    sums = sums.movedim(0, -1).squeeze(-2).contiguous()
    return gates, sums


@_descend.register_fake
def _(
    logits: Tensor, k: Tensor, mask: Tensor | None, eps: float, eps_init: float, eps_decay: float,
    num_iterations: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        logits.new_empty((*logits.shape[:-1], num_iterations)),
    )


@torch.library.custom_op("routedvit::coordinate_descent_backward", mutates_args=())
def _descend_backward(
    logits: Tensor,
    k: Tensor,
    mask: Tensor | None,
    gates: Tensor,
    sums: Tensor,
    grad: Tensor,
    eps: float,
    eps_init: float,
    eps_decay: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and k."""
    schedule = (eps, eps_init, eps_decay, sums.shape[-1])
    if uses_triton(logits):
        from routedvit.ops import coordinate_descent_triton

        return coordinate_descent_triton.coordinate_descent_backward(
            logits, k, mask, gates, sums, grad, *schedule
        )
    scores = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    tau = sums.new_tensor(temperatures(*schedule))
    shift = (k.clamp(min=1e-20).log() - sums) * tau[:-1]  # a_t, [..., T]
    last = grad * gates / tau[-1]
    free = scores + shift[..., -1:] <= 0
    out = last * free
    grad_shift = torch.empty_like(sums)  # da_t
    grad_shift[..., -1] = out.sum(-1)
    if sums.shape[-1] > 1:
        # [..., T - 1, n]: steps 2 to T; the first knows neither the logits nor a shift before it
        cap = -shift[..., :-1].unsqueeze(-1)
        scores = scores.unsqueeze(-2)
        softmax = torch.minimum(scores, cap).div_(tau[1:-1].unsqueeze(-1))
        softmax.sub_(sums[..., 1:].unsqueeze(-1)).clamp_(min=-80).exp_()  # as in forward
        saturated = scores > cap
        # not a product: where a whole row is masked the softmax is NaN
        share = softmax.masked_fill(~saturated, 0.0).sum(-1)
        passed_on = share.flip(-1).cumprod(-1).flip(-1)  # [..., T - 1]
        grad_shift[..., :-1] = passed_on * grad_shift[..., -1:]
        weight = grad_shift[..., 1:].unsqueeze(-2)
        out = out - (weight @ softmax.masked_fill_(saturated, 0.0)).squeeze(-2)
    if mask is not None:
        out = out.masked_fill(~mask, 0.0)
    grad_k = (grad_shift * tau[:-1]).sum(-1, keepdim=True) / k
    return out, grad_k.masked_fill(k <= 1e-20, 0.0)


@_descend_backward.register_fake
def _(
    logits: Tensor, k: Tensor, mask: Tensor | None, gates: Tensor, sums: Tensor, grad: Tensor,
    eps: float, eps_init: float, eps_decay: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, k, mask, *ctx.schedule, _ = inputs
    gates, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(logits, k, mask, gates, sums)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    logits, k, mask, gates, sums = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True

        def reference(logits: Tensor, k: Tensor) -> Tensor:
            eps, eps_init, eps_decay = ctx.schedule
            steps = sums.shape[-1]
            return coordinate_descent_reference(logits, k, eps, eps_init, eps_decay, steps, mask)

        return *gradients_in_graph(reference, (logits, k), grad), None, None, None, None, None
    out, grad_k = torch.ops.routedvit.coordinate_descent_backward(
        logits, k, mask, gates, sums, grad, *ctx.schedule
    )
    return out, grad_k, None, None, None, None, None


_descend.register_autograd(_backward, setup_context=_setup)
