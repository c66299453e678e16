"""Routing in one launch: exact soft top-k, hard selection and compaction of the selected indices.

One program owns one row, so the rows of all routers of a sublayer share a launch, whatever number
k each of them selects. A row of up to 8,192 tokens stays in registers; a longer one is walked in
blocks of 8,192, each pass reading it again (from L1 or L2: 256 KiB at most). Steps, all in fp32:

1. Logits become integers that sort alike. Two ranks are searched at once: the k-th largest, the
   threshold of the hard selection, and the ceil(target)-th, the anchor of the soft one (see
   `soft_topk.py`: with exponents relative to it nothing that matters under- or overflows). A pass
   counts three probes per rank: two split the bracket of values in thirds, which isolates a rank
   among normal logits in about 6 passes, the third halves the bracket of integers, which bounds
   any row by 32.
2. The threshold t of saturation is the root of  (k - #{x > t}) exp(t) - sum_{x <= t} exp(x), convex
   and increasing in exp(t). Newton from above never leaves the root's right side; it is the
   active-set iteration, 2 to 4 passes at a spread of 1 to 2 eps. After 8 passes every other one
   halves the bracket instead, so 64 bound any row.
3. Ties at the hard threshold go to the lowest index. Positions in the compact list come from one
   scan that counts sure and tied entries in the two halves of an int64.

The backward kernel reads the saved gates once and writes the gradient once. Left out: float64.

    array     shape           what it holds
    routes    [2, R] int32    per route: number selected, first column of its output
    targets   [P] float32     sum of the gates of row r at r % P (P = R, or the number of rows)
    indices   [B, sum k]      int64, ascending within a route
    picked    [B, sum k]      gates at these indices
    gates     [B * R, n]      all gates
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["route", "route_backward", "select", "soft_topk", "soft_topk_backward"]

MAX_BLOCK = 8192  # 16 fp32 per thread at 16 warps; twice that leaves too few registers
LOWEST = tl.constexpr(-(2**31))  # masked and padding: below the key of -inf
MINUS_INF = tl.constexpr(-2139095041)  # key of -inf
NAN = tl.constexpr(2**31 - 1)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _key(value):
    """fp32 -> int32 that sorts alike; -0 as 0, and NaN above all, as torch.topk has it."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(value != value, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value(key):
    """Inverse of `_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_keys(logits_ptr, mask_ptr, block, n, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    column = block * BLOCK + tl.arange(0, BLOCK)
    valid = column < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + column, mask=valid, other=0) != 0)
    key = _key(tl.load(logits_ptr + column, mask=valid, other=0.0).to(tl.float32))
    return tl.where(valid, key, LOWEST)


@triton.jit
def _probes(low, high):
    """Three keys strictly inside the bracket [low, high), where there are any."""
    first = _value(low.to(tl.int32))
    last = _value((high - 1).to(tl.int32))
    # thirds of the values without their difference, which may overflow
    third = _key(first * (2 / 3) + last * (1 / 3)).to(tl.int64)
    two_thirds = _key(first * (1 / 3) + last * (2 / 3)).to(tl.int64)
    third = tl.minimum(tl.maximum(third, low + 1), high - 1)
    two_thirds = tl.minimum(tl.maximum(two_thirds, low + 1), high - 1)
    return third, two_thirds, low + (high - low) // 2


@triton.jit
def _count(key, first, second, third):
    """How many keys reach each probe, 20 bits per count."""
    return (
        (key >= first).to(tl.int64)
        + ((key >= second).to(tl.int64) << 20)
        + ((key >= third).to(tl.int64) << 40)
    )


@triton.jit
def _narrow(low, high, at_low, at_high, rank, probe, count):
    """Move the end of the bracket that `probe` improves; at_low and at_high count keys >= end."""
    up = (count >= rank) & (probe > low)
    down = (count < rank) & (probe < high)
    low, at_low = tl.where(up, probe, low), tl.where(up, count, at_low)
    high, at_high = tl.where(down, probe, high), tl.where(down, count, at_high)
    return low, high, at_low, at_high


@triton.jit
def _narrow_by_three(low, high, at_low, at_high, rank, first, second, third, counts):
    low, high, at_low, at_high = _narrow(
        low, high, at_low, at_high, rank, first, counts & 0xFFFFF
    )
    low, high, at_low, at_high = _narrow(
        low, high, at_low, at_high, rank, second, (counts >> 20) & 0xFFFFF
    )
    return _narrow(low, high, at_low, at_high, rank, third, counts >> 40)


@triton.jit
def _open(low, high, at_low, rank):
    """Whether the bracket still hides which keys are among the `rank` largest."""
    return (at_low != rank) & (high - low > 1)


@triton.jit
def _bracket(smallest, largest, num_valid, rank):
    """First bracket of a rank: among the valid keys if they suffice, else below them."""
    enough = num_valid >= rank
    low = tl.where(enough, smallest, tl.full((), LOWEST, tl.int64))
    high = tl.where(enough, largest + 1, smallest)
    at_low = tl.where(enough, num_valid, tl.full((), -1, tl.int64))
    at_high = tl.where(enough, tl.zeros_like(num_valid), num_valid)
    return low, high, at_low, at_high


@triton.jit
def _search(
    held, logits_ptr, mask_ptr, n, hard_rank, soft_rank, smallest, largest, num_valid,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, HAS_MASK: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Brackets of both ranks; the lower end of each is reached by at least `rank` keys."""
    hard_low, hard_high, at_hard, above_hard = _bracket(smallest, largest, num_valid, hard_rank)
    soft_low, soft_high, at_soft, above_soft = _bracket(smallest, largest, num_valid, soft_rank)
    going = True
    step = 0
    while going & (step < 40):
        a, b, c = _probes(hard_low, hard_high)
        d, e, f = _probes(soft_low, soft_high)
        hard_counts = tl.zeros((BLOCK,), tl.int64)
        soft_counts = tl.zeros((BLOCK,), tl.int64)
        for block in range(NUM_BLOCKS):
            key = held
            if NUM_BLOCKS > 1:
                key = _load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
            if HARD:
                hard_counts += _count(key, a, b, c)
            if SOFT:
                soft_counts += _count(key, d, e, f)
        going = False
        if HARD:
            hard_low, hard_high, at_hard, above_hard = _narrow_by_three(
                hard_low, hard_high, at_hard, above_hard, hard_rank, a, b, c, tl.sum(hard_counts)
            )
            going = going | _open(hard_low, hard_high, at_hard, hard_rank)
        if SOFT:
            soft_low, soft_high, at_soft, above_soft = _narrow_by_three(
                soft_low, soft_high, at_soft, above_soft, soft_rank, d, e, f, tl.sum(soft_counts)
            )
            going = going | _open(soft_low, soft_high, at_soft, soft_rank)
        step += 1
    # how many of the keys equal to hard_low are needed; none where it separates exactly
    needed = tl.where(at_hard == hard_rank, 0, hard_rank - above_hard)
    return hard_low, needed, soft_low


@triton.jit
def _saturation(
    held, logits_ptr, mask_ptr, n, target, soft_rank, anchor, eps,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """exp(-t) and the largest possible t: the gates are exp(min(x, largest)) * exp(-t)."""
    largest = tl.log(n / (target - (soft_rank - 1).to(tl.float32)))
    low = tl.zeros_like(largest)
    high = largest
    at_high = tl.full((), -1.0, tl.float32)  # entries above the point whose Newton step led to high
    scale = tl.full((), 1.0, tl.float32)
    at = high
    going = True
    step = 0
    while going & (step < 64):
        above = tl.zeros((BLOCK,), tl.float32)
        weight = tl.zeros((BLOCK,), tl.float32)
        for block in range(NUM_BLOCKS):
            key = held
            if NUM_BLOCKS > 1:
                key = _load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
            valid = key > MINUS_INF
            x = tl.where(valid, (_value(key) - anchor) / eps, -float("inf"))
            above += (x > at).to(tl.float32)
            weight += tl.where(x > at, 0.0, tl.exp(tl.minimum(x, largest)))
        num_above = tl.sum(above)
        total = tl.sum(weight)
        newton = tl.log(total / (target - num_above))  # right of the root, wherever it started
        going = (at != high) | (num_above != at_high)
        low = tl.where(at < newton, tl.maximum(low, at), low)
        better = newton < high
        scale = tl.where(better | (step == 0), (target - num_above) / total, scale)
        at_high = tl.where(better | (step == 0), num_above, at_high)
        high = tl.where(better, newton, high)
        step += 1
        at = tl.where((step > 8) & (step % 2 == 1), (low + high) * 0.5, high)
    return scale, largest


@triton.jit
def routing_kernel(
    logits_ptr, mask_ptr, targets_ptr, routes_ptr, gates_ptr, picked_ptr, indices_ptr,
    n, num_targets, num_routes, total, eps,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, HAS_MASK: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * n
    mask_ptr += row * n
    held = _load_keys(logits_ptr, mask_ptr, 0, n, BLOCK, HAS_MASK)
    valid = held > MINUS_INF
    smallest = tl.min(tl.where(valid, held, NAN)).to(tl.int64)
    largest = tl.max(held).to(tl.int64)
    num_valid = tl.sum(valid.to(tl.int32)).to(tl.int64)
    for block in range(1, NUM_BLOCKS):
        key = _load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
        valid = key > MINUS_INF
        smallest = tl.minimum(smallest, tl.min(tl.where(valid, key, NAN)).to(tl.int64))
        largest = tl.maximum(largest, tl.max(key).to(tl.int64))
        num_valid += tl.sum(valid.to(tl.int32)).to(tl.int64)

    target = tl.full((), 1.0, tl.float32)
    if SOFT:
        target = tl.load(targets_ptr + row % num_targets)
    target = tl.minimum(target, num_valid.to(tl.float32))
    soft_rank = tl.maximum(tl.ceil(target), 1.0).to(tl.int64)
    hard_rank = soft_rank
    if HARD:
        hard_rank = tl.load(routes_ptr + row % num_routes).to(tl.int64)
    hard_low, needed, soft_low = _search(
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
                key = _load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
            nearest = tl.minimum(nearest, tl.where(key >= soft_low, key, NAN))
        anchor = _value(tl.min(nearest))
        scale, limit = _saturation(
            held, logits_ptr, mask_ptr, n, target, soft_rank, anchor, eps,
            BLOCK, NUM_BLOCKS, HAS_MASK,
        )  # fmt: skip

    everything = target >= num_valid.to(tl.float32)
    top_tie = tl.where(needed > 0, hard_low, hard_low - 1)  # no key is tied where none is needed
    out = tl.zeros_like(row)
    if HARD:
        out = row // num_routes * total + tl.load(routes_ptr + num_routes + row % num_routes)
    sure_before = tl.zeros_like(row)
    tied_before = tl.zeros_like(row)
    for block in range(NUM_BLOCKS):
        key = held
        if NUM_BLOCKS > 1:
            key = _load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
        column = block * BLOCK + tl.arange(0, BLOCK)
        gate = tl.zeros((BLOCK,), tl.float32)
        if SOFT:
            exponent = tl.minimum((_value(key) - anchor) / eps, limit)
            gate = tl.where(everything, 1.0, tl.minimum(tl.exp(exponent) * scale, 1.0))
            gate = tl.where(key > MINUS_INF, gate, 0.0)
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
def _free(gates_ptr, column, mask):
    """Gates below 1: the only ones with a gradient."""
    gate = tl.load(gates_ptr + column, mask=mask, other=0.0)
    return tl.where(gate < 1.0, gate, 0.0)


@triton.jit
def routing_backward_kernel(
    indices_ptr, gates_ptr, grad_ptr, out_ptr, routes_ptr, n, num_routes, total, eps,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """out = gate / eps * (g - sum g * gate / sum gate) over gates below 1; g is 0 off `indices`."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(routes_ptr + row % num_routes)
    start = row // num_routes * total + tl.load(routes_ptr + num_routes + row % num_routes)
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
        products += grad * _free(gates_ptr, index, mine)
    held = _free(gates_ptr, lane, lane < n)
    weights = held
    for block in range(1, NUM_BLOCKS):
        weights += _free(gates_ptr, block * BLOCK + lane, block * BLOCK + lane < n)
    mean = tl.sum(products) / tl.maximum(tl.sum(weights), TINY)
    for block in range(NUM_BLOCKS):
        column = block * BLOCK + lane
        gate = held
        if NUM_BLOCKS > 1:
            gate = _free(gates_ptr, column, column < n)
        tl.store(out_ptr + column, -gate * mean / eps, mask=column < n)
    # the selected entries are written a second time, by whichever thread: only after the first
    tl.debug_barrier()
    for first in range(0, count, BLOCK):
        mine = first + lane < count
        index = tl.load(indices_ptr + first + lane, mask=mine, other=0)
        grad = tl.load(grad_ptr + first + lane, mask=mine, other=0.0)
        gate = _free(gates_ptr, index, mine)
        tl.store(out_ptr + index, gate * (grad - mean) / eps, mask=mine)


@triton.jit
def soft_topk_backward_kernel(
    gates_ptr, grad_ptr, out_ptr, grad_k_ptr, n, eps,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The same for a gradient of every gate, and the gradient of the sum k."""
    row = tl.program_id(0).to(tl.int64)
    gates_ptr += row * n
    grad_ptr += row * n
    out_ptr += row * n
    lane = tl.arange(0, BLOCK)
    held = _free(gates_ptr, lane, lane < n)
    held_grad = tl.load(grad_ptr + lane, mask=lane < n, other=0.0)
    weights = held
    products = held * held_grad
    for block in range(1, NUM_BLOCKS):
        column = block * BLOCK + lane
        gate = _free(gates_ptr, column, column < n)
        weights += gate
        products += gate * tl.load(grad_ptr + column, mask=column < n, other=0.0)
    mean = tl.sum(products) / tl.maximum(tl.sum(weights), TINY)
    tl.store(grad_k_ptr + row, mean)
    for block in range(NUM_BLOCKS):
        column = block * BLOCK + lane
        gate = held
        grad = held_grad
        if NUM_BLOCKS > 1:
            gate = _free(gates_ptr, column, column < n)
            grad = tl.load(grad_ptr + column, mask=column < n, other=0.0)
        tl.store(out_ptr + column, gate * (grad - mean) / eps, mask=column < n)


def _blocks(n: int) -> dict[str, int]:
    """BLOCK, NUM_BLOCKS and num_warps for rows of n entries: 16 entries per thread."""
    block = min(max(triton.next_power_of_2(n), 32), MAX_BLOCK)
    return {
        "BLOCK": block,
        "NUM_BLOCKS": triton.cdiv(n, block),
        "num_warps": min(max(block // 512, 1), 16),
    }


@functools.lru_cache(maxsize=256)
def _routes(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """[2, R] counts and where they begin, kept on the device: no copy from the host per step."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    with torch.inference_mode(False):
        return torch.tensor([list(counts), starts], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def _targets(counts: tuple[int, ...], fetch_ratio: float, n: int, device: torch.device) -> Tensor:
    sums = [min(k * fetch_ratio, n) for k in counts]
    with torch.inference_mode(False):
        return torch.tensor(sums, dtype=torch.float32, device=device)


def _launch(
    logits: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    counts: tuple[int, ...],
    shape: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates of all entries, then gates and indices of the selected ones, in `shape`."""
    logits = logits.contiguous()
    n = logits.shape[-1]
    rows = logits.numel() // max(n, 1)
    soft, hard = targets is not None, sum(counts) > 0
    gates = torch.empty_like(logits, dtype=torch.float32) if soft else logits
    picked = logits.new_empty(shape, dtype=torch.float32)
    indices = logits.new_empty(shape, dtype=torch.int64)
    if rows > 0:
        table = _routes(counts, logits.device) if hard else logits
        routing_kernel[(rows,)](
            logits, logits if mask is None else mask, logits if targets is None else targets,
            table, gates, picked, indices,
            n, 1 if targets is None else targets.numel(), max(len(counts), 1), sum(counts), eps,
            HAS_MASK=mask is not None, SOFT=soft, HARD=hard, **_blocks(n),
        )  # fmt: skip
    return gates, picked, indices


def route(
    logits: Tensor, counts: Sequence[int], fetch_ratio: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., R, n], k of each of the R routes -> picked, indices [..., sum k], gates."""
    ks = tuple(counts)
    targets = _targets(ks, fetch_ratio, logits.shape[-1], logits.device)
    shape = (*logits.shape[:-2], sum(ks))
    gates, picked, indices = _launch(logits, None, targets, ks, shape, eps)
    return picked, indices, gates


def select(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, ascending; of equal scores the first. [..., n] -> [..., k]."""
    return _launch(scores, None, None, (k,), (*scores.shape[:-1], k), 1.0)[2]


def soft_topk(logits: Tensor, k: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """logits [..., n], k [...] or [..., 1] fp32, mask like logits -> all gates."""
    if mask is not None:
        mask = mask.expand_as(logits).contiguous().view(torch.uint8)
    return _launch(logits, mask, k.contiguous(), (), (0,), eps)[0]


def route_backward(
    indices: Tensor, gates: Tensor, grad: Tensor, counts: Sequence[int], eps: float
) -> Tensor:
    """Gradient of the logits from that of the picked gates; shapes as `route` has them."""
    n = gates.shape[-1]
    out = torch.empty_like(gates)
    if out.numel() > 0:
        ks = tuple(counts)
        routing_backward_kernel[(gates.numel() // n,)](
            indices, gates, grad.contiguous(), out, _routes(ks, gates.device),
            n, len(ks), sum(ks), eps, **_blocks(n),
        )  # fmt: skip
    return out


def soft_topk_backward(gates: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the logits and of k [..., 1] from that of all gates."""
    n = gates.shape[-1]
    out, grad_k = torch.empty_like(gates), torch.empty_like(gates[..., :1])
    if out.numel() > 0:
        soft_topk_backward_kernel[(gates.numel() // n,)](
            gates, grad.contiguous(), out, grad_k, n, eps, **_blocks(n)
        )
    return out, grad_k
