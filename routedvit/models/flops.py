"""Floating-point operations of a routed vision transformer, counted from its layers.

One multiply-add is 2 FLOPs, as in torch's `FlopCounterMode`, with which the totals agree: matrix
products, attention and the patch convolution count, element-wise work does not. For one image,
forward; training costs three times as much, less what efficient drop-path leaves out.

    P prefix tokens, N = H * W patches, D width; routed: Q queries, K keys per route, F in the FFN
"""

import math
from typing import Any, NamedTuple

from timm.layers import DropPath, SwiGLU, to_2tuple
from torch import nn

from routedvit.layers import (
    FixedRouter,
    RoutedAttention,
    RoutedBlock,
    RoutedFeedForward,
    Router,
)
from routedvit.layers.attention import HeavyAttention, WindowAttention

__all__ = ["BlockFlops", "Flops", "count_flops"]


class BlockFlops(NamedTuple):
    """FLOPs of one block and one image, forward."""

    light: int
    heavy: int
    router: int

    @property
    def total(self) -> int:
        return self.light + self.heavy + self.router


class Flops(NamedTuple):
    """FLOPs of one image, forward: per block, and what is not in a block (stem, pool, head)."""

    blocks: list[BlockFlops]
    other: int

    @property
    def light(self) -> int:
        return sum(block.light for block in self.blocks)

    @property
    def heavy(self) -> int:
        return sum(block.heavy for block in self.blocks)

    @property
    def router(self) -> int:
        return sum(block.router for block in self.blocks)

    @property
    def total(self) -> int:
        return self.light + self.heavy + self.router + self.other


def count_flops(
    model: Any, img_size: int | tuple[int, int] | None = None, *, training: bool = False
) -> Flops:
    """Count a `RoutedVisionTransformer` at an image size; its own if None.

    With `training`, the mean of an image that efficient drop-path spares some sublayers.
    """
    size = model.patch_embed.img_size if img_size is None else to_2tuple(img_size)
    grid = model.patch_embed.dynamic_feat_size(size)
    num_patches = grid[0] * grid[1]
    num_tokens = num_patches + model.num_prefix_tokens
    proj = model.patch_embed.proj
    stem = 2 * num_patches * proj.out_channels * proj.in_channels * math.prod(proj.kernel_size)
    pooled = 1 if model.global_pool else num_tokens
    head = _linear(model.head, pooled) if isinstance(model.head, nn.Linear) else 0
    pool = 0
    if model.attn_pool is not None:
        rows = num_tokens if model.pool_include_prefix else num_patches
        pool = _pool(model.attn_pool, rows)
    return Flops([_block(block, grid, training) for block in model.blocks], stem + pool + head)


def _block(block: RoutedBlock, grid: tuple[int, int], training: bool) -> BlockFlops:
    attn, mlp = _attention(block.attn, grid), _feedforward(block.mlp, grid)
    if training:
        attn, mlp = _kept(block.attn, attn), _kept(block.mlp, mlp)
    return BlockFlops(*(a + b for a, b in zip(attn, mlp, strict=True)))


def _kept(layer: RoutedAttention | RoutedFeedForward, flops: BlockFlops) -> BlockFlops:
    if not layer.skip_dropped:
        return flops
    assert isinstance(layer.drop_path, DropPath)
    share = 1 - layer.drop_path.drop_prob
    return BlockFlops(*(round(share * own) for own in flops))


def _attention(layer: RoutedAttention, grid: tuple[int, int]) -> BlockFlops:
    num_windows, patches = 1, grid[0] * grid[1]
    if layer.heavy_window:  # routed and attended inside each window
        num_windows, patches = patches // layer.light_window**2, layer.light_window**2
        grid = (layer.light_window, layer.light_window)
    tokens = layer.num_prefix + patches
    queries = layer.num_prefix + layer.q_router.num_selected(patches)
    keys = layer.num_prefix + layer.kv_router.num_selected(patches)
    light = 0 if layer.light is None else _light_attention(layer.light, tokens, grid)
    heavy = _heavy_attention(layer.heavy, queries, keys)
    router = _scores(layer.q_router, tokens) + _scores(layer.kv_router, tokens)
    return BlockFlops(num_windows * light, num_windows * heavy, num_windows * router)


def _light_attention(layer: WindowAttention, tokens: int, grid: tuple[int, int]) -> int:
    rows, columns = (-(-side // layer.window) for side in grid)
    inner_dim = layer.num_heads * layer.head_dim
    # every query of a window, padding included, meets w * w keys, once for scores, once for values
    products = 4 * rows * columns * layer.window**4 * inner_dim
    return _linear(layer.qkv, tokens) + products + _linear(layer.proj, tokens)


def _heavy_attention(layer: HeavyAttention, queries: int, keys: int) -> int:
    seen = keys + (layer.null_kv is not None)
    products = 4 * queries * seen * layer.num_heads * layer.head_dim
    # each kv route has its own K rows and its own share of the kv projection
    projections = _linear(layer.q, queries) + _linear(layer.kv, keys) + _linear(layer.proj, queries)
    return projections + products


def _feedforward(layer: RoutedFeedForward, grid: tuple[int, int]) -> BlockFlops:
    patches = grid[0] * grid[1]
    tokens = layer.num_prefix + patches
    routed = layer.num_prefix + layer.router.num_selected(patches)
    light = 0 if layer.light is None else _mlp(layer.light, tokens)
    return BlockFlops(light, _mlp(layer.heavy, routed), _scores(layer.router, tokens))


def _mlp(layer: Any, rows: int) -> int:
    first = (layer.fc1_g, layer.fc1_x) if isinstance(layer, SwiGLU) else (layer.fc1,)
    return sum(_linear(linear, rows) for linear in (*first, layer.fc2))


def _scores(router: Router | FixedRouter, tokens: int) -> int:
    if router.takes_all():  # what decides nothing is not computed
        return 0
    return 2 * tokens * sum(_size(p) for p in router.parameters())


def _pool(pool: Any, rows: int) -> int:
    """timm's attention pools: 'map' has one latent query, 'prr' attends without projections."""
    dim = pool.num_heads * pool.head_dim
    if not hasattr(pool, "kv"):
        return 4 * rows * rows * dim
    projections = _linear(pool.q, 1) + _linear(pool.kv, rows) + _linear(pool.proj, 1)
    return projections + 4 * rows * dim + (0 if pool.mlp is None else _mlp(pool.mlp, 1))


def _linear(layer: Any, rows: int) -> int:
    return 2 * rows * int(layer.in_features) * int(layer.out_features)


def _size(parameter: Any) -> int:
    """Elements of the whole parameter; where it is sharded (ZeRO-3) its own shape is empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
