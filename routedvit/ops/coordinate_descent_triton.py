"""Coordinate descent with epsilon scaling, forward and backward in one launch each.

One program owns one row, of any length, in blocks of up to 4,096 entries. What an iteration leaves
behind is one scalar, the logsumexp l_t of its softmax, hence the shift a_t = tau_t (log k - l_t);
the other multiplier is -relu(s + a_t), entry by entry. So the forward pass keeps [rows, iterations]
scalars, and the backward pass rebuilds every iteration from two of them: linear in the number of
iterations, where colt5-attention's kernel, which starts again from the first iteration for each, is
quadratic.

Backward, with e_t = (s + b_{t-1}) / tau_t, p_t = softmax(e_t) = exp(e_t - l_t),
b_t = -relu(s + a_t), and G = g * gate / tau of the last line of the forward pass:

    db_T = G,  da_T = sum G + sum_{s + a_T > 0} -db_T
    db_{t-1} = -da_t p_t,  da_{t-1} = sum_{s + a_{t-1} > 0} -db_{t-1}
    ds = G + sum_t (db_{t-1} - [s + a_t > 0] db_t) - db_0,   dk = sum_t tau_t da_t / k

da comes first, a pass over the row per iteration; then ds, in one pass, entry by entry. Nothing of
the size of the row is kept in between.

    array          shape        what it holds
    temperatures   [T + 1]      tau_t, and that of the gates
    sums           [rows, T]    l_t
    grads          [rows, T]    da_t
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from routedvit.ops.row_tiles_triton import row_block

__all__ = ["coordinate_descent", "coordinate_descent_backward"]


@triton.jit
def _load(logits_ptr, mask_ptr, start, n, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    """Logits, -inf where masked or past the end: such an entry adds nothing to any sum."""
    column = start + tl.arange(0, BLOCK)
    valid = column < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + column, mask=valid, other=0) != 0)
    logit = tl.load(logits_ptr + column, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, logit, -float("inf"))


@triton.jit
def _shift(temperatures_ptr, sums_ptr, log_k, t):
    """a_t; anything before the first iteration."""
    temperature = tl.load(temperatures_ptr + t, mask=t >= 0, other=0.0)
    return temperature * (log_k - tl.load(sums_ptr + t, mask=t >= 0, other=0.0))


@triton.jit
def _exponent(logit, shift, temperature, t):
    """e_t from a_{t-1}; b is -s before the first iteration."""
    excess = tl.where(t == 0, -logit, -tl.maximum(logit + shift, 0.0))
    return tl.where(logit > -float("inf"), (logit + excess) / temperature, logit)


@triton.jit
def coordinate_descent_kernel(
    logits_ptr, mask_ptr, k_ptr, temperatures_ptr, gates_ptr, sums_ptr, n, num_iterations,
    BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * n
    mask_ptr += row * n
    gates_ptr += row * n
    sums_ptr += row * num_iterations
    log_k = tl.log(tl.maximum(tl.load(k_ptr + row).to(tl.float32), 1e-20))
    shift = tl.zeros_like(log_k)
    for t in range(num_iterations):
        temperature = tl.load(temperatures_ptr + t)
        # running maximum and sum of exp, entry by entry of the block, over the blocks of the row
        largest = tl.full((BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            logit = _load(logits_ptr, mask_ptr, start, n, BLOCK, HAS_MASK)
            exponent = _exponent(logit, shift, temperature, t)
            larger = tl.maximum(largest, exponent)
            total = tl.where(
                larger > -float("inf"),
                total * tl.exp(largest - larger) + tl.exp(exponent - larger),
                0.0,
            )
            largest = larger
        peak = tl.max(largest)
        total = tl.sum(tl.where(largest > -float("inf"), total * tl.exp(largest - peak), 0.0))
        total = tl.log(total) + peak
        shift = temperature * (log_k - total)
        tl.store(sums_ptr + t, total)
    temperature = tl.load(temperatures_ptr + num_iterations)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = _load(logits_ptr, mask_ptr, start, n, BLOCK, HAS_MASK)
        gate = tl.exp((logit + shift - tl.maximum(logit + shift, 0.0)) / temperature)
        # a maximum swallows NaN, but a loss should show it
        tl.store(gates_ptr + column, tl.where(logit != -float("inf"), gate, 0.0), mask=column < n)


@triton.jit
def _softmax(logit, temperatures_ptr, sums_ptr, log_k, t):
    """p_t."""
    shift = _shift(temperatures_ptr, sums_ptr, log_k, t - 1)
    exponent = _exponent(logit, shift, tl.load(temperatures_ptr + t), t)
    return tl.exp(exponent - tl.load(sums_ptr + t))


@triton.jit
def _last_gradient(logit, gates_ptr, grad_ptr, column, n, temperature):
    """G: the gradient of the exponent of the gates."""
    gate = tl.load(gates_ptr + column, mask=column < n, other=0.0)
    grad = tl.load(grad_ptr + column, mask=column < n, other=0.0)
    return tl.where(logit > -float("inf"), grad * gate / temperature, 0.0)


@triton.jit
def coordinate_descent_backward_kernel(
    logits_ptr, mask_ptr, k_ptr, temperatures_ptr, gates_ptr, sums_ptr, grad_ptr,
    grads_ptr, out_ptr, grad_k_ptr, n, num_iterations,
    BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * n
    mask_ptr += row * n
    gates_ptr += row * n
    grad_ptr += row * n
    out_ptr += row * n
    sums_ptr += row * num_iterations
    grads_ptr += row * num_iterations
    k = tl.load(k_ptr + row).to(tl.float32)
    log_k = tl.log(tl.maximum(k, 1e-20))
    final = tl.load(temperatures_ptr + num_iterations)
    later = tl.zeros_like(log_k)  # da_{t+1}
    grad_log_k = tl.zeros_like(log_k)
    for back in range(num_iterations):
        t = num_iterations - 1 - back
        shift = _shift(temperatures_ptr, sums_ptr, log_k, t)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logit = _load(logits_ptr, mask_ptr, start, n, BLOCK, HAS_MASK)
            if back == 0:
                last = _last_gradient(logit, gates_ptr, grad_ptr, column, n, final)
                sums += tl.where(logit + shift > 0.0, 0.0, last)
            else:
                share = later * _softmax(logit, temperatures_ptr, sums_ptr, log_k, t + 1)
                sums += tl.where(logit + shift > 0.0, share, 0.0)
        later = tl.sum(sums)
        grad_log_k += tl.load(temperatures_ptr + t) * later
        tl.store(grads_ptr + t, later)
    tl.store(grad_k_ptr + row, tl.where(k > 1e-20, grad_log_k / k, 0.0))
    # every thread reads back what some thread has just stored
    tl.debug_barrier()
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = _load(logits_ptr, mask_ptr, start, n, BLOCK, HAS_MASK)
        grad_excess = _last_gradient(logit, gates_ptr, grad_ptr, column, n, final)
        out = grad_excess
        for back in range(num_iterations):
            t = num_iterations - 1 - back
            shift = _shift(temperatures_ptr, sums_ptr, log_k, t)
            out -= tl.where(logit + shift > 0.0, grad_excess, 0.0)
            share = _softmax(logit, temperatures_ptr, sums_ptr, log_k, t)
            grad_excess = -tl.load(grads_ptr + t) * share
            out += grad_excess
        # a masked entry may have met the sum of no entries
        out = tl.where(logit > -float("inf"), out - grad_excess, 0.0)
        tl.store(out_ptr + column, out, mask=column < n)


def _temperatures(
    eps: float, eps_init: float, eps_decay: float, num_iterations: int, device: torch.device
) -> Tensor:
    """`routedvit.ops.coordinate_descent.temperatures`, computed on the device: a copy from the host
    would wait for it, and a tensor kept from an earlier call is one that no CUDA graph expects.
    """
    steps = torch.arange(num_iterations + 1, device=device, dtype=torch.float64)
    return (max(eps_init, eps) * eps_decay**steps).clamp_(min=eps).float()


def coordinate_descent(
    logits: Tensor,
    k: Tensor,
    mask: Tensor | None,
    eps: float,
    eps_init: float,
    eps_decay: float,
    num_iterations: int,
) -> tuple[Tensor, Tensor]:
    """logits [..., n], k [..., 1], bool mask [..., n] -> gates [..., n], sums [..., T], fp32."""
    n = logits.shape[-1]
    logits, k = logits.contiguous(), k.contiguous()
    gates = torch.empty_like(logits, dtype=torch.float32)
    sums = logits.new_empty((*logits.shape[:-1], num_iterations), dtype=torch.float32)
    if gates.numel() > 0:
        with torch.cuda.device_of(logits):
            coordinate_descent_kernel[(k.numel(),)](
                logits, logits if mask is None else mask.contiguous().view(torch.uint8), k,
                _temperatures(eps, eps_init, eps_decay, num_iterations, logits.device),
                gates, sums, n, num_iterations,
                HAS_MASK=mask is not None, **row_block(n),
            )  # fmt: skip
    return gates, sums


def coordinate_descent_backward(
    logits: Tensor,
    k: Tensor,
    mask: Tensor | None,
    gates: Tensor,
    sums: Tensor,
    grad: Tensor,
    eps: float,
    eps_init: float,
    eps_decay: float,
    num_iterations: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and k."""
    n = logits.shape[-1]
    logits, k = logits.contiguous(), k.contiguous()
    out = torch.empty_like(gates)
    grad_k = torch.empty_like(k, dtype=torch.float32)
    if out.numel() > 0:
        with torch.cuda.device_of(logits):
            coordinate_descent_backward_kernel[(k.numel(),)](
                logits, logits if mask is None else mask.contiguous().view(torch.uint8), k,
                _temperatures(eps, eps_init, eps_decay, num_iterations, logits.device),
                gates, sums, grad.contiguous(), torch.empty_like(sums), out, grad_k,
                n, num_iterations,
                HAS_MASK=mask is not None, **row_block(n),
            )  # fmt: skip
    return out.to(logits.dtype), grad_k.to(k.dtype)
