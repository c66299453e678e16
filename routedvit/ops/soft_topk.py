"""Exact soft top-k: the routing weights of CoLT5 without its iteration.

    gate_i = min(1, exp((s_i + a) / eps)),   a such that  sum_i gate_i = k

is the KL projection of exp(s / eps) on the capped simplex (CoLT5, arXiv 2303.09752, appendix C,
finds it with 50 steps of coordinate descent). With the m largest entries saturated at 1, the rest
share what is left:

    gate_U = (k - m) * softmax(s_U / eps),   U = the entries that are not saturated

so the only thing to find is m, the smallest m for which no entry of U exceeds 1. That condition is
monotone in m, hence one sorted top-k and one cumulative sum count it. Differentiating the line
above with U held fixed *is* the closed-form gradient: plain autograd, nothing unrolled.

    ds_i = gate_i / eps * (g_i - sum_U g * gate / (k - m))   on U, else 0

Exactness in float32 at any spread of the logits rests on one anchor. The threshold -a / eps lies in
[z_j, z_j + log(n / f)], where z_j is the ceil(k)-th largest of z = s / eps and f is the fractional
part of k (1 for an integer): exponentials are taken relative to z_j and clamped just above that
interval, so nothing that matters underflows or overflows. And since only entries above z_j can
saturate, m < k holds without a guard.

Cost: one `topk` of ceil(k) entries, a cumulative sum over them, one softmax. Left out: the
iteration, which is in `coordinate_descent.py`.
"""

import math

import torch
from torch import Tensor

from routedvit.ops.backend import uses_triton
from routedvit.ops.coordinate_descent import coordinate_descent

__all__ = ["TINY", "capped_softmax", "gates_gradient", "soft_topk"]

SOLVERS = ("exact", "coordinate_descent")
TINY = torch.finfo(torch.float32).tiny


def soft_topk(
    logits: Tensor,
    k: float | Tensor,
    *,
    eps: float = 1.0,
    mask: Tensor | None = None,
    solver: str = "exact",
) -> Tensor:
    """Differentiable relaxation of "the k largest of the last dimension".

    Args:
        logits: [..., n], any floating type.
        k: what each row sums to, in (0, n]; may be fractional. A tensor gives one k per row, [...].
        eps: temperature; gates become hard 0 / 1 as it goes to 0.
        mask: [..., n] bool, True where an entry takes part. A row with fewer than k entries gives
            1 to each of them.
        solver: 'exact', or 'coordinate_descent' with 20 steps of epsilon scaling.

    Returns:
        gates [..., n] in [0, 1], float32 (float64 for float64 logits), 0 where masked, equal for
        equal logits.

    Raises:
        ValueError: unknown solver, eps <= 0, or a number k outside (0, n].
    """
    n = logits.shape[-1]
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    if eps <= 0:
        raise ValueError(f"eps={eps} must be positive")
    if not isinstance(k, Tensor) and not 0 < k <= n:
        raise ValueError(f"k={k} must lie in (0, {n}], the number of entries in a row")
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    if isinstance(k, Tensor):
        k_row = k.to(logits.dtype).unsqueeze(-1).expand_as(logits[..., :1])
        num_sorted = n
    else:
        k_row = torch.full_like(logits[..., :1], k)
        num_sorted = math.ceil(k)
    if solver == "coordinate_descent":
        return coordinate_descent(logits, k_row, eps=eps, mask=mask)
    if uses_triton(logits):
        return torch.ops.routedvit.soft_topk(logits, k_row, eps, mask)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return capped_softmax(logits, logits.detach().topk(num_sorted, dim=-1).values, k_row, eps)


def capped_softmax(logits: Tensor, top: Tensor, k: Tensor, eps: float) -> Tensor:
    """The solver behind `soft_topk`, in the part of Python that TorchScript and export accept.

    Args:
        logits: [..., n] float32 or float64, -inf where an entry takes no part.
        top: [..., t] their t largest in descending order, t at least ceil(k).
        k: [..., 1] of the same type.
        eps: temperature.
    """
    scores = logits.detach()
    valid = scores != -math.inf  # NaN too: it makes the gates of its row NaN, which a loss shows
    num_valid = valid.sum(-1, keepdim=True).to(k.dtype)
    k = torch.minimum(k, num_valid)
    threshold, anchor = _saturation(scores, top, k.detach(), eps)
    saturated = (scores >= threshold) & (scores > anchor)

    # exponents relative to the anchor: at most log(n / f) + 2 on free entries; a row without any
    # entry must not become softmax(-inf, ...) = NaN
    exponent = ((logits - anchor) / eps).masked_fill(saturated | ~valid, -math.inf)
    exponent = torch.where(num_valid > 0, exponent, torch.zeros_like(exponent))
    remaining = k - saturated.sum(-1, keepdim=True).to(k.dtype)
    gates = (remaining * exponent.softmax(-1)).clamp(max=1.0)
    # every entry selected: the gates are 1 whatever the logits, so the gradient is exactly 0, even
    # among ties
    closed = saturated | (valid & (k >= num_valid))
    return torch.where(valid & ~closed, gates, closed.to(gates.dtype))


def gates_gradient(gates: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The closed form above in PyTorch that differentiates itself, for a second derivative.

    Args:
        gates: [..., n], all of them.
        grad: [..., n], theirs.
        eps: temperature.

    Returns:
        gradients of the logits [..., n] and of k [..., 1].
    """
    free = gates.masked_fill(gates == 1, 0)
    weighted = free * grad
    mean = weighted.sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp(min=TINY)
    return (weighted - free * mean) / eps, mean


def _saturation(scores: Tensor, top: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Per row, [..., 1]: the smallest saturated score (+inf where there is none), the anchor."""
    # this many entries may saturate, the next one is the anchor
    num_above = (k.ceil().long() - 1).clamp(min=0)
    anchor = top.gather(-1, num_above)
    fraction = k - num_above
    ceiling = (scores.shape[-1] / fraction).log() + 2
    rank = torch.ones_like(top).cumsum(-1) - 1
    above = torch.minimum((top - anchor) / eps, ceiling).exp().masked_fill(rank >= num_above, 0)
    at_or_above = scores >= anchor
    rest = ((scores - anchor) / eps).masked_fill(at_or_above, -math.inf).exp().sum(-1, keepdim=True)
    # the anchor and its ties weigh 1 each
    rest = rest + (at_or_above.sum(-1, keepdim=True) - num_above)
    # total weight from rank m on, summed from the small end, so that nothing is lost
    suffix = above.flip(-1).cumsum(-1).flip(-1) + rest
    num_saturated = ((k - rank) * above > suffix).sum(-1, keepdim=True)
    lowest = top.gather(-1, (num_saturated - 1).clamp(min=0))
    return lowest.masked_fill(num_saturated == 0, math.inf), anchor
