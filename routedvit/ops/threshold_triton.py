"""The two thresholds of a row, of the hard and of the soft top-k: functions inside the kernels.

A row is `held` in registers when it fits one block; else every pass loads its blocks again.

1. Logits become integers that sort alike. Two ranks are searched at once: the k-th largest, the
   threshold of the hard selection, and the ceil(target)-th, the anchor of the soft one (see
   `soft_topk.py`: with exponents relative to it nothing that matters under- or overflows). A pass
   counts three probes per rank: two split the bracket of values in thirds, which isolates a rank
   among normal logits in about 6 passes; the third halves the bracket of integers, which bounds
   any row by 32.
2. With x = (logit - anchor) / eps, the threshold t of saturation is the root of

       (k - #{x > t}) exp(t) - sum_{x <= t} exp(x),    0 <= t <= log(n / f),

   f the fractional part of k: convex and increasing in exp(t), so Newton from above never leaves
   the root's right side. It is the active-set iteration, 2 to 4 passes at a spread of 1 to 2 eps.
   After 8 passes every other one halves the bracket instead, so 64 bound any row.
"""

import triton
import triton.language as tl

__all__ = ["MINUS_INF", "NAN", "load_keys", "saturation", "search", "to_value"]

LOWEST = tl.constexpr(-(2**31))  # masked and padding: below the key of -inf
MINUS_INF = tl.constexpr(-2139095041)  # key of -inf
NAN = tl.constexpr(2**31 - 1)


@triton.jit
def to_key(value):
    """fp32 -> int32 that sorts alike; -0 as 0, and NaN above all, as torch.topk has it."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits == LOWEST, 0, bits)  # the bits of -0
    return tl.where(value != value, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def to_value(key):
    """Inverse of `to_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(logits_ptr, mask_ptr, block, n, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    """One block of a row as integers that sort alike; LOWEST where masked or past the end."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    valid = column < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + column, mask=valid, other=0) != 0)
    key = to_key(tl.load(logits_ptr + column, mask=valid, other=0.0).to(tl.float32))
    return tl.where(valid, key, LOWEST)


@triton.jit
def _probes(low, high):
    """Three keys strictly inside the bracket [low, high), where there are any."""
    first = to_value(low.to(tl.int32))
    last = to_value((high - 1).to(tl.int32))
    # thirds of the values without their difference, which may overflow
    third = to_key(first * (2 / 3) + last * (1 / 3)).to(tl.int64)
    two_thirds = to_key(first * (1 / 3) + last * (2 / 3)).to(tl.int64)
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
    low, high, at_low, at_high = _narrow(low, high, at_low, at_high, rank, first, counts & 0xFFFFF)
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
def search(
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
                key = load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
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
def saturation(
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
                key = load_keys(logits_ptr, mask_ptr, block, n, BLOCK, HAS_MASK)
            valid = key > MINUS_INF
            x = tl.where(valid, (to_value(key) - anchor) / eps, -float("inf"))
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
