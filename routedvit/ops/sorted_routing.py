"""Routing on a CPU: one sort of bare values where `torch.topk` would sort pairs.

A row's k-th largest score decides the selection and its sorted scores decide the gates; neither
needs to know which token a score came from. NumPy sorts bare values with AVX-512 or NEON, 5 to 15
times faster than `torch.topk` sorts values with their indices, and the compaction in ascending
order is one pass over `score >= threshold`. Of long rows only the part that matters is sorted, the
largest ceil(target); the rest is moved below it. Everything is a handful of passes over [rows, n].

The mathematics is that of `soft_topk.py`. With weights e_j = exp(s_j / eps - anchor) in ascending
order, their running sum c_j is the weight of rank m and all ranks below it, so m entries saturate
as long as (k - m) * e > c holds at rank m, and what the free entries sum to is an element of c.

Left out: rows whose k-th and next score tie, NaN, and rows with fewer than ceil(target) scores
above minus infinity. The caller takes the other way there.
"""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["route_rows"]

LONG_ROW = 2048  # entries from which it pays to move the small ones aside instead of sorting them


def route_rows(
    logits: Tensor, k: int, target: float, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Select k entries per row and weigh all of them with the exact soft top-k.

    Args:
        logits: [rows, n] float32 or float64 on the CPU, contiguous, n > target.
        k: entries to select, at most target.
        target: what the gates of a row sum to, k <= target < n.
        eps: temperature.

    Returns:
        gates of the selected [rows, k], their indices [rows, k] int64 ascending, and all gates
        [rows, n]; None if a tie or a NaN leaves the selection open, or no anchor is finite.
    """
    rows, n = logits.shape
    scores = logits if eps == 1 else logits / eps
    first = n - math.ceil(target)  # where the anchor is
    ascending = _ascending(scores, first)
    # NaN, the last, selects fewer, which a tie in another row could make up
    if ascending[:, -1].isnan().any() or ascending[:, first].isneginf().any():
        return None
    selected = scores >= ascending[:, n - k : n - k + 1]
    flat = torch.from_numpy(np.flatnonzero(selected.numpy()))
    if flat.numel() != rows * k:  # a tie selects more
        return None
    indices = flat.view(rows, k) - torch.arange(0, rows * n, n).unsqueeze(1)
    gates = _gates(scores, ascending, target)
    return gates.gather(-1, indices), indices, gates


def _ascending(scores: Tensor, first: int) -> Tensor:
    """Rows [rows, n] sorted from `first` on, and before it what is no larger, in any order."""
    n = scores.shape[-1]
    if n < LONG_ROW or first < n / 2:
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    parted = np.partition(scores.numpy(), first, axis=-1)
    parted[:, first:].sort(axis=-1)
    return torch.from_numpy(parted)


def _gates(scores: Tensor, ascending: Tensor, target: float) -> Tensor:
    """min(1, exp(score + a)) with the a of each row for which its gates sum to target.

    `ascending` need be so for the largest ceil(target) alone, and is written over.
    """
    n = scores.shape[-1]
    num_above = math.ceil(target) - 1  # so many entries may saturate, the next one is the anchor
    first = n - num_above
    anchor = ascending[:, first - 1 : first].clone()
    # free entries lie at most log(n / f) above the anchor, f the part of the target left to it
    ceiling = math.log(n / (target - num_above)) + 2
    weight = ascending.sub_(anchor).clamp_(max=ceiling).exp_()
    # from the anchor on; the anchor's element carries all that lies below it
    running = weight[:, first - 1 :].clone()
    running[:, 0] = weight[:, :first].sum(-1)
    running = running.cumsum(-1)
    left = target - torch.arange(num_above - 1, -1, -1, dtype=scores.dtype)
    num_saturated = (weight[:, first:] * left > running[:, 1:]).sum(-1, keepdim=True)
    free = running.gather(-1, num_above - num_saturated)
    # a number less an integer tensor would be float32, also among float64
    shift = ((target - num_saturated.to(scores.dtype)) / free).log_()
    return (scores - anchor).add_(shift).clamp_(max=0).exp_()
