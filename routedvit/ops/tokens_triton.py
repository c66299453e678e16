"""Gather and scatter of routed tokens, each way in one launch, deterministic, without atomics.

Indices ascend within a route, as `route` and `select` return them. So a token finds out by binary
search whether it was routed, and as which row: log2 K steps in L1, no inverse index to build, no
zero fill, no atomic add. A scatter is therefore written as a gather, one program per block of
tokens of the *output*, and every output is written once, by one thread, in a fixed order of
summation (fp32, rounded once). The one exception adds to what is there already, row by row.

    B images, N tokens, R routes, K routed tokens of each, D width

    array    shape       what it holds
    x, base  [B, N, D]
    index    [B, R, K]   int64, ascending within a route; R = 1 for scatter
    rows     [B, R, K, D]
    gate     [B, K]      fp32
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "add_rows",
    "gather",
    "gather_backward",
    "scatter_add",
    "scatter_add_backward",
    "token_rows",
]

TOKENS = 256  # of a program that looks up tokens alone
TILE = 4096  # elements of a program: 32 per thread at 4 warps, 8 loads of 16 bytes in bf16


@triton.jit
def find_row(index_ptr, token, num_rows):
    """Where each token stands in the ascending list of num_rows indices, or -1."""
    low = tl.zeros_like(token)
    high = tl.zeros_like(token) + num_rows
    left = num_rows
    while left > 0:
        middle = (low + high) // 2
        searching = low < high
        at = tl.load(index_ptr + middle, mask=searching, other=0)
        low = tl.where(searching & (at < token), middle + 1, low)
        high = tl.where(searching & (at >= token), middle, high)
        left = left // 2
    at = tl.load(index_ptr + low, mask=low < num_rows, other=-1)
    return tl.where(at == token, low, -1)


@triton.jit
def gather_kernel(
    x_ptr, index_ptr, out_ptr, num_rows, dim, stride_image, stride_token,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, j] = x[b, index[b, j]], ROWS rows of an image at a time."""
    image = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(index_ptr + image * num_rows + row, mask=row < num_rows, other=0)
    inside = (row < num_rows)[:, None] & (column < dim)[None, :]
    source = x_ptr + image * stride_image + token[:, None] * stride_token + column[None, :]
    target = out_ptr + (image * num_rows + row)[:, None] * dim + column[None, :]
    tl.store(target, tl.load(source, mask=inside, other=0.0), mask=inside)


@triton.jit
def gather_backward_kernel(
    index_ptr, grad_ptr, out_ptr, num_tokens, num_routes, num_rows, dim,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, n] = sum over the routes that took token n of its gradient there, 0 where none did."""
    image = tl.program_id(0).to(tl.int64)
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (token < num_tokens)[:, None] & (column < dim)[None, :]
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for r in range(num_routes):
        first = (image * num_routes + r) * num_rows
        row = find_row(index_ptr + first, token, num_rows)
        source = grad_ptr + (first + row)[:, None] * dim + column[None, :]
        total += tl.load(source, mask=inside & (row >= 0)[:, None], other=0.0).to(tl.float32)
    target = out_ptr + (image * num_tokens + token)[:, None] * dim + column[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_rows_kernel(
    out_ptr, index_ptr, rows_ptr, num_tokens, num_rows, dim, stride_index, stride_rows,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, index[b, j]] += rows[b, j], in place; nothing else of out is touched."""
    image = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(index_ptr + image * stride_index + row, mask=row < num_rows, other=0)
    inside = (row < num_rows)[:, None] & (column < dim)[None, :]
    source = rows_ptr + image * stride_rows + row[:, None] * dim + column[None, :]
    target = out_ptr + (image * num_tokens + token)[:, None] * dim + column[None, :]
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(source, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scatter_add_kernel(
    base_ptr, residual_ptr, index_ptr, rows_ptr, gate_ptr, out_ptr, num_tokens, num_rows, dim,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out[b, n] = residual[b, n] + base[b, n] + gate[b, j] * rows[b, j] where index[b, j] = n."""
    image = tl.program_id(0).to(tl.int64)
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (token < num_tokens)[:, None] & (column < dim)[None, :]
    place = (image * num_tokens + token)[:, None] * dim + column[None, :]
    # under way while the search below waits for one load after the other
    total = tl.load(base_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    row = find_row(index_ptr + image * num_rows, token, num_rows)
    routed = row >= 0
    gate = tl.load(gate_ptr + image * num_rows + row, mask=routed, other=0.0).to(tl.float32)
    source = rows_ptr + (image * num_rows + row)[:, None] * dim + column[None, :]
    heavy = tl.load(source, mask=inside & routed[:, None], other=0.0).to(tl.float32)
    total += gate[:, None] * heavy
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scatter_add_backward_kernel(
    index_ptr, rows_ptr, gate_ptr, grad_ptr, grad_rows_ptr, grad_gate_ptr,
    num_tokens, num_rows, dim,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the routed rows: grad_rows = gate * grad[index], grad_gate = rows . grad[index]."""
    image = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mine = row < num_rows
    token = tl.load(index_ptr + image * num_rows + row, mask=mine, other=0)
    gate = tl.load(gate_ptr + image * num_rows + row, mask=mine, other=0.0).to(tl.float32)
    dots = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(0, dim, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = mine[:, None] & (column < dim)[None, :]
        source = grad_ptr + (image * num_tokens + token)[:, None] * dim + column[None, :]
        place = (image * num_rows + row)[:, None] * dim + column[None, :]
        grad = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        dots += grad * tl.load(rows_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad_rows = (gate[:, None] * grad).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + place, grad_rows, mask=inside)
    grad_gate = tl.sum(dots, axis=1).to(grad_gate_ptr.dtype.element_ty)
    tl.store(grad_gate_ptr + image * num_rows + row, grad_gate, mask=mine)


@triton.jit
def token_rows_kernel(index_ptr, out_ptr, num_tokens, num_rows, BLOCK_N: tl.constexpr):
    """out[g, n] = j where index[g, j] = n, else -1; g is an image and a route."""
    group = tl.program_id(0).to(tl.int64)
    token = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row = find_row(index_ptr + group * num_rows, token, num_rows)
    tl.store(out_ptr + group * num_tokens + token, row, mask=token < num_tokens)


def _tile(dim: int) -> dict[str, int]:
    """BLOCK_D columns, the power of two that wastes least up to 1024, and rows to fill a TILE."""
    block = max(16, min(triton.next_power_of_2(dim), 1024))
    while block > 128 and -dim % block >= block // 4:
        block //= 2
    return {"ROWS": TILE // block, "BLOCK_D": block}


def _grid(num_rows: int, batch: int, dim: int, tile: dict[str, int]) -> tuple[int, int, int]:
    """Images first: CUDA allows 2^31 of them, but 65,535 of the others."""
    return batch, triton.cdiv(num_rows, tile["ROWS"]), triton.cdiv(dim, tile["BLOCK_D"])


def token_rows(index: Tensor, num_tokens: int) -> Tensor:
    """index [B, R, K] -> [B, R, N]: as which row each route took a token, or -1."""
    out = index.new_empty((*index.shape[:2], num_tokens))
    if out.numel() > 0:
        grid = (index.shape[0] * index.shape[1], triton.cdiv(num_tokens, TOKENS))
        with torch.cuda.device_of(index):
            token_rows_kernel[grid](
                index.contiguous(), out, num_tokens, index.shape[2], BLOCK_N=TOKENS
            )
    return out


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, D], index [B, R, K] -> [B, R, K, D]."""
    batch, _, dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty((*index.shape, dim))
    if out.numel() > 0:
        tile, num_rows = _tile(dim), index.shape[1] * index.shape[2]
        with torch.cuda.device_of(x):
            gather_kernel[_grid(num_rows, batch, dim, tile)](
                x, index.contiguous(), out, num_rows, dim, x.stride(0), x.stride(1), **tile,
            )  # fmt: skip
    return out


def gather_backward(index: Tensor, grad: Tensor, num_tokens: int) -> Tensor:
    """index [B, R, K], grad [B, R, K, D] -> gradient of x [B, N, D]."""
    batch, num_routes, num_rows, dim = grad.shape
    out = grad.new_empty((batch, num_tokens, dim))
    if out.numel() > 0:
        tile = _tile(dim)
        with torch.cuda.device_of(grad):
            gather_backward_kernel[_grid(num_tokens, batch, dim, tile)](
                index.contiguous(), grad.contiguous(), out, num_tokens, num_routes, num_rows, dim,
                **tile,
            )  # fmt: skip
    return out


def add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows [B, K, D] to out [B, N, D], contiguous, where index [B, K] says; a row each."""
    batch, num_tokens, dim = out.shape
    if rows.numel() > 0:
        tile, num_rows = _tile(dim), index.shape[1]
        with torch.cuda.device_of(out):
            add_rows_kernel[_grid(num_rows, batch, dim, tile)](
                out, index, rows, num_tokens, num_rows, dim, index.stride(0), rows.stride(0),
                **tile,
            )  # fmt: skip


def scatter_add(
    base: Tensor, index: Tensor, rows: Tensor, gate: Tensor, residual: Tensor | None
) -> Tensor:
    """base [B, N, D], index [B, K], rows [B, K, D], gate [B, K] -> [B, N, D]."""
    batch, num_tokens, dim = base.shape
    base = base.contiguous()
    summand = base if residual is None else residual.contiguous()
    out = torch.empty_like(base, dtype=torch.promote_types(base.dtype, summand.dtype))
    if out.numel() > 0:
        tile = _tile(dim)
        with torch.cuda.device_of(base):
            scatter_add_kernel[_grid(num_tokens, batch, dim, tile)](
                base, summand, index.contiguous(), rows.contiguous(), gate.contiguous(), out,
                num_tokens, index.shape[1], dim, HAS_RESIDUAL=residual is not None, **tile,
            )  # fmt: skip
    return out


def scatter_add_backward(
    index: Tensor, rows: Tensor, gate: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows [B, K, D] and gate [B, K]; those of base and residual are grad itself."""
    batch, num_rows, dim = rows.shape
    rows, gate = rows.contiguous(), gate.contiguous()
    grad_rows, grad_gate = torch.empty_like(rows), torch.empty_like(gate)
    if grad_rows.numel() > 0:
        tile = _tile(dim)
        with torch.cuda.device_of(rows):
            scatter_add_backward_kernel[(batch, triton.cdiv(num_rows, tile["ROWS"]))](
                index.contiguous(), rows, gate, grad.contiguous(), grad_rows, grad_gate,
                grad.shape[1], num_rows, dim, **tile,
            )  # fmt: skip
    return grad_rows, grad_gate
