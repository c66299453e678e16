"""Gradient norms per block and per path: where a deep routed network learns, and where it does not.

A router whose gradient is zero, a light path that drowns the heavy one, a first block that gets
nothing: none of this shows in the global norm. Parameters are placed by their names alone, so any
timm model has norms per block and a routed one per path too. The squares of all places add up to
the square of the global norm. Gradients are those after the last micro-batch and before clipping,
however often a forward was recomputed for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = re.compile(r"(.*?)blocks\.(\d+)\.(.*)")
PATH = re.compile(r"(?:^|[._])(light|heavy|router)(?:[._]|$)")
REST = "rest"  # stem, positions, last norm, head


def place(name: str) -> tuple[str, str]:
    """(block, path) of a parameter: 'blocks.3.mlp.heavy.fc1.bias' -> ('block_03', 'heavy').

    The path is 'light', 'heavy', 'router' or 'other'.
    """
    match = BLOCK.fullmatch(name)
    if match is None:
        return REST, "other"
    stack, number, inner = match.groups()
    path = PATH.search(inner)
    return f"{stack}block_{int(number):02d}", path.group(1) if path else "other"


def gradient_norms(gradients: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """2-norms by place: 'block_03/heavy', 'block_03/all', 'all/heavy', 'rest/all'.

    Args:
        gradients: (parameter name, whole gradient), once each. One transfer from the device.
    """
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients:
        block, path = place(name)
        square = torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
        keys = {f"{block}/all"} if block == REST else {f"{block}/{path}", f"{block}/all"}
        for key in keys | {f"all/{path}"}:
            squares[key] = squares[key] + square if key in squares else square
    norms = torch.stack(list(squares.values())).sqrt().tolist()
    return dict(sorted(zip(squares, norms, strict=True)))
