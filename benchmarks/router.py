"""Routing from logits to gates and indices, forward and backward, beside what else there is.

    python -m benchmarks.router [--rounds 30] [--forward]

A quarter of the tokens is selected, gates sum to 9/8 of that. Baselines in the same run: 20
iterations of `colt5-attention` with the top-k that follows them (its Python; on a GPU its Triton
kernel too, which is the baseline there), `torch.topk` with the sort of its indices, and on a GPU
two floors: empty launches, one each way, and a copy of the bytes that routing must move.

On a machine without a GPU it times the PyTorch implementation.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.original import original
from benchmarks.timing import interleave, report
from routedvit.ops import coordinate_descent, route, route_all

SHAPES = [(256, 196), (64, 1024), (16, 4096)]
RATIO = 1.125
SCHEDULE: dict[str, Any] = {"eps": 1.0, "eps_init": 4.0, "eps_decay": 0.7}


def step(
    function: Callable[[Tensor], Tensor], logits: Tensor, weight: Tensor, backward: bool
) -> Callable[[], object]:
    """A call of `function`, logits -> gates of the selected, and of its backward."""
    if not backward:
        return lambda: function(logits)
    leaf = logits.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf), leaf, weight)


def routing(batch: int, n: int, device: str, backward: bool) -> dict[str, Callable[[], object]]:
    """The cases for logits [batch, n]."""
    k = n // 4
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, n, generator=generator).to(device)
    weight = torch.randn(batch, k, generator=generator).to(device)
    # As tensors: a number would be copied from the host at each call, which no CUDA graph allows,
    # and of a single entry colt5-attention's Triton kernel reads past the end.
    total = torch.full((batch,), k * RATIO, device=device)
    target = total.unsqueeze(1)

    def ours_by_descent(s: Tensor) -> Tensor:
        gates = coordinate_descent(s, target, **SCHEDULE)
        return gates.gather(-1, gates.detach().topk(k).indices)

    functions = {
        "exact": lambda s: route(s, k, RATIO)[1],
        "coordinate descent": ours_by_descent,
    }
    if theirs := original():
        coor_descent = theirs.coor_descent
        functions["colt5-attention"] = lambda s: (
            coor_descent(s, n_iters=20, k=total, **SCHEDULE).topk(k).values
        )
    if theirs and device == "cuda":
        from colt5_attention.triton_coor_descent import triton_coor_descent

        functions["colt5-attention Triton"] = lambda s: (
            triton_coor_descent(s, n_iters=20, k=total, checkpoint_segments=4, **SCHEDULE)
            .topk(k)
            .values
        )
    cases = {name: step(f, logits, weight, backward) for name, f in functions.items()}
    cases["torch.topk and sort"] = lambda: logits.topk(k, sorted=False).indices.sort(-1)
    if device == "cuda":
        cases |= floors(batch, n, k, backward)
    return cases


def pair(batch: int, n: int, device: str) -> dict[str, Callable[[], object]]:
    """The q and the kv router of a sublayer, forward: is one launch worth having?"""
    logits, counts = torch.randn(batch, 2, n, device=device), [n // 4, n // 2]
    alone = [row.contiguous() for row in logits.unbind(1)]
    return {
        "one after the other": lambda: [
            route(row, k) for row, k in zip(alone, counts, strict=True)
        ],
        "together": lambda: route_all(logits, counts),
    }


def floors(batch: int, n: int, k: int, backward: bool) -> dict[str, Callable[[], object]]:
    """Empty launches, one each way, and a copy that reads and writes as many bytes as routing."""
    forward = batch * (n * 8 + k * 12)  # logits in; all gates, picked gates and indices out
    gradient = batch * (n * 8 + k * 12)  # gates, indices and gradient in; gradient out
    moved = forward + gradient if backward else forward
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target, one = torch.empty_like(source), torch.empty(1, device="cuda")

    def launches() -> None:
        for _ in range(1 + backward):
            one.zero_()

    return {"empty launches": launches, "copy of the same bytes": lambda: target.copy_(source)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--forward", action="store_true", help="without the backward pass")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    baseline = "colt5-attention Triton" if device == "cuda" else "colt5-attention"
    name = "router" if not arguments.forward else "router, forward only"
    for batch, n in SHAPES:
        seconds = interleave(pair(batch, n, device), arguments.rounds, device)
        report("router", f"{batch} x {n}, q and kv,", seconds, "one after the other")
        cases = routing(batch, n, device, not arguments.forward)
        seconds = interleave(cases, arguments.rounds, device)
        beside = baseline if baseline in seconds else "torch.topk and sort"
        report(name, f"{batch} x {n}", seconds, beside)


if __name__ == "__main__":
    main()
