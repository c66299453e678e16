"""Routing in one launch: exact soft top-k, hard selection and compaction of the selected indices.

One program owns one row, so the rows of all routers of a sublayer share a launch, whatever number
k each of them selects. A row of up to 4,096 tokens stays in registers; a longer one is walked in
blocks of 4,096, each pass reading it again (from L1 or L2: 256 KiB at most). All in fp32. How the
two thresholds are found is told in `threshold_triton.py`. Ties at the hard one go to the lowest
index; positions in the compact list come from one scan, which counts sure and tied entries in the
two halves of an int64. The backward kernel reads the saved gates once. Left out: float64.

How many each route selects (COUNTS) and what its gates sum to (TARGETS) are compiled in: they are
few, and a table on the device would be a copy from the host, or, kept, a tensor that torch's CUDA
graphs find in their pool and take for a leak.

    array     shape           what it holds
    targets   [rows] float32  sum of the gates of a row, where TARGETS does not say
    indices   [B, sum k]      int64, ascending within a route
    picked    [B, sum k]      gates at these indices
    gates     [B * R, n]      all gates
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from routedvit.ops.row_tiles_triton import row_blocks
from routedvit.ops.threshold_triton import MINUS_INF, NAN, load_keys, saturation, search, to_value

__all__ = ["free_gates", "launch_routing", "route", "route_backward", "select"]

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _own_columns(row, COUNTS: tl.constexpr, ROUTES: tl.constexpr):
    """How many entries a row selects, and where they go in the flat list of all rows."""
    route = row % ROUTES
    count = tl.zeros_like(row)
    before = tl.zeros_like(row)
    total = tl.zeros_like(row)
    for r in tl.static_range(ROUTES):
        count = tl.where(route == r, COUNTS[r], count)
        before += tl.where(route > r, COUNTS[r], 0)
        total += COUNTS[r]
    return count, row // ROUTES * total + before


@triton.jit
def routing_kernel(
    logits_ptr, mask_ptr, targets_ptr, gates_ptr, picked_ptr, indices_ptr, n, eps,
    COUNTS: tl.constexpr, TARGETS: tl.constexpr, ROUTES: tl.constexpr,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, HAS_MASK: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * n
    mask_ptr += row * n
    held = load_keys(logits_ptr, mask_ptr, 0, n, BLOCK, HAS_MASK)
    valid = held > MINUS_INF
    smallest = tl.min(tl.where(valid, held, NAN)).to(tl.int64)
    largest = tl.max(held).to(tl.int64)
    num_valid = tl.sum(valid.to(tl.int32)).to(tl.int64)
    for block in range(1, NUM_BLOCKS):
        key = load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
        valid = key > MINUS_INF
        smallest = tl.minimum(smallest, tl.min(tl.where(valid, key, NAN)).to(tl.int64))
        largest = tl.maximum(largest, tl.max(key).to(tl.int64))
        num_valid += tl.sum(valid.to(tl.int32)).to(tl.int64)

    target = tl.full((), 1.0, tl.float32)
    if SOFT and ROUTES > 0:
        for r in tl.static_range(ROUTES):
            target = tl.where(row % ROUTES == r, TARGETS[r], target)
    elif SOFT:
        target = tl.load(targets_ptr + row)
    target = tl.minimum(target, num_valid.to(tl.float32))
    soft_rank = tl.maximum(tl.ceil(target), 1.0).to(tl.int64)
    hard_rank = soft_rank
    out = tl.zeros_like(row)
    if HARD:
        hard_rank, out = _own_columns(row, COUNTS, ROUTES)
    hard_low, needed, soft_low = search(
        held, logits_ptr, mask_ptr, n, hard_rank, soft_rank, smallest, largest, num_valid,
        BLOCK, NUM_BLOCKS, HAS_MASK, SOFT, HARD,
    )  # fmt: skip

    anchor = tl.full((), 0.0, tl.float32)
    scale = anchor
    limit = anchor
    if SOFT:
        nearest = tl.full((BLOCK,), NAN, tl.int32)
        for block in range(NUM_BLOCKS):
            key = held
            if NUM_BLOCKS > 1:
                key = load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
            nearest = tl.minimum(nearest, tl.where(key >= soft_low, key, NAN))
        anchor = to_value(tl.min(nearest))
        scale, limit = saturation(
            held, logits_ptr, mask_ptr, n, target, soft_rank, anchor, eps,
            BLOCK, NUM_BLOCKS, HAS_MASK,
        )  # fmt: skip

    everything = target >= num_valid.to(tl.float32)
    top_tie = tl.where(needed > 0, hard_low, hard_low - 1)  # no key is tied where none is needed
    sure_before = tl.zeros_like(row)
    tied_before = tl.zeros_like(row)
    for block in range(NUM_BLOCKS):
        key = held
        if NUM_BLOCKS > 1:
            key = load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
        column = block * BLOCK + tl.arange(0, BLOCK)
        gate = tl.zeros((BLOCK,), tl.float32)
        if SOFT:
            exponent = tl.minimum((to_value(key) - anchor) / eps, limit)
            gate = tl.where(everything, 1.0, tl.minimum(tl.exp(exponent) * scale, 1.0))
            gate = tl.where(key > MINUS_INF, gate, 0.0)
            # a minimum swallows NaN, but a loss should show it
            gate = tl.where(key == NAN, float("nan"), gate)
            tl.store(gates_ptr + row * n + column, gate, mask=column < n)
        if HARD:
            tied = (key >= hard_low) & (key <= top_tie)
            sure = key > top_tie
            both = sure.to(tl.int64) + (tied.to(tl.int64) << 32)
            before = tl.cumsum(both) - both
            sure_rank = sure_before + (before & 0xFFFFFFFF)
            tied_rank = tied_before + (before >> 32)
            chosen = sure | (tied & (tied_rank < needed))
            place = out + sure_rank + tl.minimum(tied_rank, needed)
            tl.store(indices_ptr + place, column.to(tl.int64), mask=chosen)
            if SOFT:
                tl.store(picked_ptr + place, gate, mask=chosen)
            if NUM_BLOCKS > 1:
                block_total = tl.sum(both)
                sure_before += block_total & 0xFFFFFFFF
                tied_before += block_total >> 32


@triton.jit
def free_gates(gates_ptr, column, mask):
    """Gates below 1: the only ones with a gradient."""
    gate = tl.load(gates_ptr + column, mask=mask, other=0.0)
    return tl.where(gate < 1.0, gate, 0.0)


@triton.jit
def routing_backward_kernel(
    indices_ptr, gates_ptr, grad_ptr, out_ptr, n, eps,
    COUNTS: tl.constexpr, ROUTES: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """out = gate / eps * (g - sum g * gate / sum gate) over gates below 1; g is 0 off `indices`."""
    row = tl.program_id(0).to(tl.int64)
    count, start = _own_columns(row, COUNTS, ROUTES)
    gates_ptr += row * n
    out_ptr += row * n
    indices_ptr += start
    grad_ptr += start
    lane = tl.arange(0, BLOCK)
    products = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        mine = first + lane < count
        index = tl.load(indices_ptr + first + lane, mask=mine, other=0)
        grad = tl.load(grad_ptr + first + lane, mask=mine, other=0.0)
        products += grad * free_gates(gates_ptr, index, mine)
    held = free_gates(gates_ptr, lane, lane < n)
    weights = held
    for block in range(1, NUM_BLOCKS):
        weights += free_gates(gates_ptr, block * BLOCK + lane, block * BLOCK + lane < n)
    mean = tl.sum(products) / tl.maximum(tl.sum(weights), TINY)
    for block in range(NUM_BLOCKS):
        column = block * BLOCK + lane
        gate = held
        if NUM_BLOCKS > 1:
            gate = free_gates(gates_ptr, column, column < n)
        tl.store(out_ptr + column, -gate * mean / eps, mask=column < n)
    # the selected entries are written a second time, by whichever thread: only after the first
    tl.debug_barrier()
    for first in range(0, count, BLOCK):
        mine = first + lane < count
        index = tl.load(indices_ptr + first + lane, mask=mine, other=0)
        grad = tl.load(grad_ptr + first + lane, mask=mine, other=0.0)
        gate = free_gates(gates_ptr, index, mine)
        tl.store(out_ptr + index, gate * (grad - mean) / eps, mask=mine)


def launch_routing(
    logits: Tensor,
    mask: Tensor | None,
    targets: Tensor | tuple[float, ...] | None,
    counts: tuple[int, ...],
    shape: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates of all entries, then gates and indices of the selected ones, in `shape`.

    `targets`, what the gates sum to, are one per route, or a tensor with one per row where nothing
    is selected; None leaves the gates out.
    """
    logits = logits.contiguous()
    n = logits.shape[-1]
    rows = logits.numel() // max(n, 1)
    soft, hard = targets is not None, sum(counts) > 0
    per_row, per_route = (targets, ()) if isinstance(targets, Tensor) else (logits, targets)
    gates = torch.empty_like(logits, dtype=torch.float32) if soft else logits
    picked = logits.new_empty(shape, dtype=torch.float32)
    indices = logits.new_empty(shape, dtype=torch.int64)
    if rows > 0:
        # Triton launches on the current device, which need not be the tensor's
        with torch.cuda.device_of(logits):
            routing_kernel[(rows,)](
                logits, logits if mask is None else mask, per_row, gates, picked, indices, n, eps,
                COUNTS=counts, TARGETS=per_route or (), ROUTES=len(counts),
                HAS_MASK=mask is not None, SOFT=soft, HARD=hard, **row_blocks(n),
            )  # fmt: skip
    return gates, picked, indices


def route(
    logits: Tensor, counts: Sequence[int], fetch_ratio: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., R, n], k of each of the R routes -> picked, indices [..., sum k], gates."""
    ks, n = tuple(counts), logits.shape[-1]
    targets = tuple(min(k * fetch_ratio, float(n)) for k in ks)
    shape = (*logits.shape[:-2], sum(ks))
    gates, picked, indices = launch_routing(logits, None, targets, ks, shape, eps)
    return picked, indices, gates


def select(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, ascending; of equal scores the first. [..., n] -> [..., k]."""
    return launch_routing(scores, None, None, (k,), (*scores.shape[:-1], k), 1.0)[2]


def route_backward(
    indices: Tensor, gates: Tensor, grad: Tensor, counts: Sequence[int], eps: float
) -> Tensor:
    """Gradient of the logits from that of the picked gates; shapes as `route` has them."""
    n = gates.shape[-1]
    out = torch.empty_like(gates)
    if out.numel() > 0:
        ks = tuple(counts)
        with torch.cuda.device_of(gates):
            routing_backward_kernel[(gates.numel() // n,)](
                indices, gates, grad.contiguous(), out, n, eps,
                COUNTS=ks, ROUTES=len(ks), **row_blocks(n),
            )  # fmt: skip
    return out
