"""Scores, gather and scatter of routed tokens and attention in windows, beside a copy of the bytes.

    python -m benchmarks.tokens [--rounds 30]

ViT-B at 224 and 512 px, a quarter of the tokens routed, a quarter of the heads light. The baseline
is the copy: a ratio of 1.25 is 80 % of copy bandwidth. "PyTorch" is the reference implementation on
the same device. Without a GPU only that is timed. There each call takes the next of a few sets of
tensors, and as many results are kept: together they are several times as large as the L2 cache, so
that what is timed is memory.
"""

import argparse
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence

import torch

from benchmarks.timing import interleave, report
from routedvit.ops import (
    gather_norm,
    gather_tokens,
    router_logits,
    scatter_add_tokens,
    window_attention,
)
from routedvit.ops.backend import backend, set_backend

Operators = dict[str, dict[str, Callable[[], object]]]

SETS = 4
SHAPES = [(256, 197, 768), (64, 1025, 768)]  # one prefix token
LIGHT_HEADS, WINDOW = 3, 7


def cases(batch: int, n: int, dim: int, device: str) -> Operators:
    """operator -> case -> call; the copy among them moves the bytes that the operator must."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    k = n // 4
    index = torch.rand(batch, n, device=device).argsort(-1)[:, :k].sort(-1).values
    x, base = torch.randn(2, batch, n, dim, device=device, dtype=dtype)
    rows = torch.randn(batch, k, dim, device=device, dtype=dtype)
    gate = torch.rand(batch, k, device=device)
    weight, bias = torch.ones(2, dim, device=device, dtype=dtype)
    light, side = dim // 4, math.isqrt(n - 1)
    qkv = torch.randn(batch, n, 3 * light, device=device, dtype=dtype)
    for t in (x, base, rows, gate, weight, bias, qkv):
        t.requires_grad_()
    all_rows, few = x.numel() * x.element_size(), rows.numel() * x.element_size()

    def scattered(*wanted: torch.Tensor) -> object:
        out = scatter_add_tokens(base, index, rows, gate, x)
        return torch.autograd.grad(out, wanted, out.detach()) if wanted else out

    def gathered(*wanted: torch.Tensor) -> object:
        out = gather_tokens(x, index)
        return torch.autograd.grad(out, wanted, rows.detach()) if wanted else out

    def normed(*wanted: torch.Tensor) -> object:
        out = gather_norm(x, index, weight, bias)
        return torch.autograd.grad(out, wanted, rows.detach()) if wanted else out

    def scored(*wanted: torch.Tensor) -> object:
        out = router_logits(x, weight.unsqueeze(0), dim**-0.5, 0)
        return torch.autograd.grad(out, wanted, out.detach()) if wanted else out

    def attended(*wanted: torch.Tensor) -> object:
        out = window_attention(qkv, side, side, WINDOW, LIGHT_HEADS, 1)
        return torch.autograd.grad(out, wanted, out.detach()) if wanted else out

    narrow = qkv.numel() // 3 * qkv.element_size()
    operators = {
        "scores": (scored, all_rows),
        "scores, backward too": (lambda: scored(x, weight), 3 * all_rows),
        "gather": (gathered, 2 * few),
        "gather, backward too": (lambda: gathered(x), 3 * few + all_rows),
        "scatter": (scattered, 3 * all_rows + few),
        "scatter, backward too": (lambda: scattered(rows, gate), 3 * all_rows + 4 * few),
        "gather and norm": (normed, 2 * few),
        "gather and norm, backward too": (lambda: normed(x, weight, bias), 4 * few + all_rows),
        "windows": (attended, 4 * narrow),
        "windows, backward too": (lambda: attended(qkv), 11 * narrow),
    }
    return {name: _with_copy(*work, device) for name, work in operators.items()}


def rotating(sets: Sequence[Operators]) -> Operators:
    """Calls that go through the sets in turn."""

    def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        turn = itertools.cycle(calls)
        # else each call would write where the one before it wrote, which the cache still holds
        results: deque[object] = deque(maxlen=len(calls))
        return lambda: results.append(next(turn)())

    return {
        operator: {case: in_turn([own[operator][case] for own in sets]) for case in calls}
        for operator, calls in sets[0].items()
    }


def _with_copy(
    function: Callable[[], object], moved: int, device: str
) -> dict[str, Callable[[], object]]:
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def by(name: str) -> Callable[[], object]:
        def call() -> object:
            if backend() != name:
                set_backend(name)
            return function()

        return call

    ours = {"kernel": by("triton")} if device == "cuda" else {}
    return {"copy": lambda: target.copy_(source), "PyTorch": by("torch"), **ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for batch, n, dim in SHAPES if device == "cuda" else [(8, 197, 768)]:
        sets = [cases(batch, n, dim, device) for _ in range(SETS if device == "cuda" else 1)]
        for operator, calls in rotating(sets).items():
            seconds = interleave(calls, rounds, device)
            report("tokens", f"{batch} x {n} x {dim} {operator}", seconds, "copy")


if __name__ == "__main__":
    main()
