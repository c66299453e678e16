"""One block of ViT-B width, forward and backward: routed, dense, and what the routing itself costs.

    python -m benchmarks.block [--rounds 10]

Cases in one interleaved run: timm's dense block, the routed block, both compiled, a block of
`colt5-attention` with the same numbers of heavy tokens, and the routed block's routing alone:
scores, soft top-k, selection, gather and scatter, forward and backward, without any projection or
attention. The last one over the routed block is the share of routing in a block's time. On a GPU in
bf16.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks.original import original
from benchmarks.timing import interleave, report
from benchmarks.train_step import DTYPES
from routedvit.layers import RoutedBlock
from routedvit.layers.router import Router, decide_together
from routedvit.ops import gather_all, prepend_prefix, scatter_add_tokens

DIM, HEADS, PREFIX = 768, 12, 4
SHAPES = {"cpu": [(16, 14), (4, 28)], "cuda": [(256, 14), (64, 28)]}  # images, side of the grid


def descend_on_device(descent: Callable[..., Tensor], s: Tensor, *, k: float, **kwargs: Any) -> Any:
    """k as a tensor: a number would be copied from the host, which no CUDA graph allows."""
    return descent(s, k=torch.full_like(s[..., 0], k), **kwargs)


class SeedBlock(nn.Module):
    """Both sublayers of the seed, with a quarter of the tokens heavy; 14 patches, windows of 7."""

    def __init__(self, side: int) -> None:
        from colt5_attention import ConditionalRoutedImageAttention
        from colt5_attention.transformer_block import ConditionalRoutedFeedForward

        super().__init__()
        self.side, in_window = side, 49
        self.attention = ConditionalRoutedImageAttention(
            DIM,
            num_heavy_tokens_q=in_window // 4,
            num_heavy_tokens_kv=in_window // 2,
            light_dim_head=64,
            light_heads=3,
            light_window_size=7,
            heavy_dim_head=64,
            heavy_heads=HEADS,
            channel_first=False,
        )
        self.feed_forward = ConditionalRoutedFeedForward(
            DIM, num_heavy_tokens=side * side // 4, light_ff_mult=0.5, heavy_ff_mult=4
        )
        for module in cast(Iterator[Any], self.modules()):
            if hasattr(module, "coor_descent"):
                module.coor_descent = partial(descend_on_device, module.coor_descent)

    def forward(self, x: Tensor) -> Tensor:
        image = x.unflatten(1, (self.side, self.side))
        x = (self.attention(image) + image).flatten(1, 2)
        return self.feed_forward(x) + x


def routing_alone(block: RoutedBlock, x: Tensor) -> Tensor:
    """What `block` does to decide, fetch and put back, on normalised tokens x."""
    routers = [block.attn.q_router, block.attn.kv_router]
    logits = [router(x, PREFIX) for router in routers]
    decisions = decide_together(cast(list[Router], routers), logits)
    (q_index, q_gate, _), (kv_index, kv_gate, _) = decisions
    q_index, q_gate = prepend_prefix(q_index.squeeze(1), q_gate.squeeze(1), PREFIX)
    kv_index, kv_gate = prepend_prefix(kv_index, kv_gate, PREFIX)
    x, (rows, keys) = gather_all(x, [q_index, kv_index])
    context = keys * kv_gate.unsqueeze(-1).to(keys.dtype)
    x = scatter_add_tokens(x, q_index, rows, q_gate)
    index, gate, _ = block.mlp.router.decide(block.mlp.router(x, PREFIX))
    index, gate = prepend_prefix(index.squeeze(1), gate.squeeze(1), PREFIX)
    x, (rows,) = gather_all(x, [index])
    out = scatter_add_tokens(x, index, rows, gate)
    return out.sum() + context.sum()


def cases(batch: int, side: int, device: str) -> dict[str, Callable[[], object]]:
    """Forward and backward of each case."""
    dtype = DTYPES[device]
    tokens = torch.randn(batch, side * side + PREFIX, DIM, device=device, dtype=dtype)
    grad = torch.randn_like(tokens)
    patches = tokens[:, PREFIX:].contiguous()

    def step(function: Callable[[Tensor], Tensor], x: Tensor = tokens) -> Callable[[], object]:
        def call() -> object:
            out = function(x.detach().requires_grad_())
            return out.backward(grad[:, -out.shape[1] :]) if out.ndim else out.backward()

        return call

    dense = Block(DIM, HEADS, qkv_bias=True).to(device, dtype)
    routed = RoutedBlock(DIM, HEADS, num_prefix=PREFIX).to(device, dtype)
    with_grid = partial(routed, grid=(side, side))
    # each shape in code of its own, not in that of the first with sizes left open
    torch.compiler.reset()
    compiled = partial(torch.compile, dynamic=False)
    theirs = {}
    if original():
        theirs = {"colt5-attention": step(SeedBlock(side).to(device, dtype), patches)}
    return {
        "timm dense": step(dense),
        "timm dense, compiled": step(compiled(dense)),
        "routed": step(with_grid),
        "routed, compiled": step(compiled(with_grid)),
        **theirs,
        "routing alone": step(partial(routing_alone, routed)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")  # the seed's deprecated autocast
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for batch, side in SHAPES[device]:
        seconds = interleave(cases(batch, side, device), rounds, device)
        ratios = report("block", f"{batch} x {side}^2", seconds, "routed")
        share = ratios["routing alone"]
        print(f"block {batch} x {side}^2: routing is {share:.1%} of the routed block's time")


if __name__ == "__main__":
    main()
