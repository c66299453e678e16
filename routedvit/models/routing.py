"""Looking at routing: what every router of a model decided for some images.

Recorded by forward hooks on the routers' decisions while the model runs as it always does, so
nothing is stashed in the model, outputs do not change, and it works where parameters are sharded.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from routedvit.ops import merge_windows

__all__ = ["Routing", "record_routing"]


class Routing(NamedTuple):
    """What one router decided for a batch.

    indices: [B, k] int64 ascending, patches in raster order (prefix tokens are not counted).
    gates: [B, k] float32, the factor of each selected patch.
    logits: [B, N] float32, the score of every patch.
    grid: (H, W) with N = H * W.
    """

    indices: Tensor
    gates: Tensor
    logits: Tensor
    grid: tuple[int, int]


def record_routing(model: Any, images: Tensor) -> dict[str, Routing]:
    """Run the model once, without gradients, in the mode it is in.

    Returns:
        one entry per router and route, in depth order: 'blocks.0.q', 'blocks.0.kv0', ...,
        'blocks.0.ffn', 'blocks.1.q', ...
    """
    found: dict[str, Routing] = {}
    grid = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))

    def record(name: str, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        for route, parts in enumerate(zip(*(t.unbind(1) for t in output), strict=True)):
            indices, gates, logits = parts
            if logits.shape[1] < grid[0] * grid[1]:  # routed window by window
                indices, gates, logits = _of_the_image(indices, gates, logits, grid)
            key = f"{name}{route}" if name.endswith(".kv") else name
            found[key] = Routing(indices, gates, logits, grid)

    hooks = [
        router.decision.register_forward_hook(partial(record, name))
        for name, router in model.routers().items()
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _of_the_image(
    indices: Tensor, gates: Tensor, logits: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """[B * windows, ...] of single windows -> [B, ...] of whole images."""
    height, width = grid
    window = round(logits.shape[1] ** 0.5)
    patch = torch.arange(height * width, device=indices.device).view(height, width)
    rows, columns = height // window, width // window
    raster = patch.view(rows, window, columns, window).transpose(1, 2).reshape(-1, window * window)
    batch = len(indices) // len(raster)
    indices = raster.repeat(batch, 1).gather(1, indices).view(batch, -1)
    indices, order = indices.sort(1)
    gates = gates.reshape(batch, -1).gather(1, order)
    return indices, gates, merge_windows(logits.unsqueeze(-1), height, width, window).squeeze(-1)
