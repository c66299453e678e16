"""The same bits from the same step on a GPU: attention's gradients and some convolutions are summed
in any order unless torch is told otherwise. On a CPU they always are the same.
"""

import os

import torch


def be_deterministic() -> None:
    """Take the operators whose sums have an order; those that have none become errors.

    Call it before anything runs on a GPU. For the life of the process.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    # read when cuBLAS starts: a workspace of its own for each stream
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Fills every `empty`, against reads of what nobody wrote; our kernels write all they make.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
