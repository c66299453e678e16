"""How programs share out whole rows: what norms, scores and routing need, which reduce over a row.

A norm takes several rows at a time, each in one piece (`row_tile`); routing takes one row, however
long, block by block (`row_block`, `row_blocks`).
"""

import triton

__all__ = ["MAX_BLOCK", "MAX_PROGRAMS", "row_block", "row_blocks", "row_tile"]

TILE = 4096  # elements of a program at 8 warps; with 4 the backward pass of a norm spills
MAX_PROGRAMS = 512  # of a backward pass: about 4 for each multiprocessor of a large GPU
# 16 entries per thread at 8 warps; 16 warps leave 128 registers to a thread, and that spills
MAX_BLOCK = 4096


def row_tile(dim: int) -> dict[str, int]:
    """ROWS, BLOCK_D and num_warps for rows of `dim` entries: up to 16,384 wide at 16 warps."""
    block = max(16, triton.next_power_of_2(dim))
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK_D": block, "num_warps": min(max(rows * block // 512, 1), 16)}


def row_block(n: int) -> dict[str, int]:
    """BLOCK and num_warps for rows of n entries: 16 entries per thread."""
    block = min(max(triton.next_power_of_2(n), 32), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": max(block // 512, 1)}


def row_blocks(n: int) -> dict[str, int]:
    """The same, and in NUM_BLOCKS how many blocks make a row."""
    chosen = row_block(n)
    return {**chosen, "NUM_BLOCKS": triton.cdiv(n, chosen["BLOCK"])}
