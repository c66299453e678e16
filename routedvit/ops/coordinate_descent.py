"""Soft top-k by coordinate descent with epsilon scaling, kept for compatibility.

The solver of CoLT5 and CoDA. Alternates between the two dual variables of the entropic programme
that `soft_topk` solves in closed form (Wright, arXiv 1502.04759; CoLT5, 2303.09752, appendix C),
while the temperature falls from `eps_init` to `eps` (Schmitzer, 1610.06519; CoDA, 2304.04947).
Follows the PyPI package `colt5-attention` step for step, so gates and gradients agree with it to
rounding error. With logits spread over more than about 2 eps, 20 steps do not converge: the sum
overshoots k. Cost: `num_iterations` logsumexps, all of them kept for the backward pass.
"""

import torch
from torch import Tensor

from routedvit.ops.backend import uses_triton

__all__ = ["coordinate_descent"]


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
    if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
        if uses_triton(logits):
            mask = None if mask is None else mask.expand_as(logits)
            return torch.ops.routedvit.coordinate_descent(
                logits, k, mask, eps, eps_init, eps_decay, num_iterations
            )[0]
    # the most negative finite number rather than -inf: (-inf) - (-inf) would poison the first step
    lowest = -torch.finfo(logits.dtype).max
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
