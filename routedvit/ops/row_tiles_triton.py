"""How programs share out whole rows: what norms and scores need, which reduce over a row."""

import triton

__all__ = ["MAX_PROGRAMS", "row_tile"]

TILE = 4096  # elements of a program at 8 warps; with 4 the backward pass of a norm spills
MAX_PROGRAMS = 512  # of a backward pass: about 4 for each multiprocessor of a large GPU


def row_tile(dim: int) -> dict[str, int]:
    """ROWS, BLOCK_D and num_warps for rows of `dim` entries: up to 16,384 wide at 16 warps."""
    block = max(16, triton.next_power_of_2(dim))
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK_D": block, "num_warps": min(max(rows * block // 512, 1), 16)}
