"""Attention sublayer of a routed block (CoLT5, arXiv 2303.09752, section 3.1), with its residual.

    x = x + light(norm(x)) + q_gate * heavy(norm(x)[q], kv_gate * norm(x)[kv])

the last term added to the rows q.

Light attention sees every token in its window; heavy attention lets the routed queries attend to
the routed keys and values of the whole image. Unselected tokens get nothing from the heavy path,
or a learned null token. Prefix tokens are always heavy, as queries and as keys, with gate 1.

What the PyPI package `colt5-attention` does otherwise are switches: heavy attention that stays
inside each window (`heavy_window`), routers on the raw residual (`route_raw`), a norm of its own
for the heavy path (`separate_norms`).
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerNorm, LayerScale, register_notrace_function
from torch import Tensor, nn
from torch.jit import Final

from routedvit.layers.attention import HeavyAttention, WindowAttention
from routedvit.layers.checkpointing import recompute
from routedvit.layers.fixed_router import build_router
from routedvit.layers.norms import gather_rows
from routedvit.layers.positions import take_rope
from routedvit.layers.router import Router, decide_together, keep_in_graph
from routedvit.layers.stochastic_depth import add_to_kept_images
from routedvit.layers.wrapped import is_watched
from routedvit.ops import (
    gather_tokens,
    merge_windows,
    partition_windows,
    prepend_prefix,
    scatter_add_tokens,
    settle_gradient,
)
from routedvit.ops.backend import plain_pytorch

__all__ = ["RoutedAttention"]

for function in (
    *(gather_tokens, scatter_add_tokens, prepend_prefix),
    *(partition_windows, merge_windows),
):
    register_notrace_function(function)


def check_windows(height: int, width: int, window: int) -> None:
    """ValueError where windows with heavy attention of their own would have to be padded."""
    if height % window + width % window > 0:
        raise ValueError(
            f"heavy attention inside windows needs a grid that light_window={window} divides,"
            f" not {height} x {width} patches"
        )


class RoutedAttention(nn.Module):
    """Light window attention for all tokens plus heavy global attention for the routed ones.

    Args:
        dim: token width D.
        num_heads, head_dim: heavy heads and their width.
        light_heads, light_head_dim, light_window: light heads (0: no light path), their width,
            side of a window.
        num_prefix: prefix tokens P in front of the patches.
        q_capacity, kv_capacity: share of the patches that are heavy queries, and heavy keys of
            each kv route.
        kv_routes, kv_gate, null_kv: see `HeavyAttention`.
        router, router_kwargs: see `build_router`.
        gate_queries: the q gate also multiplies the normalised queries, not only their output.
        null_token: give unselected tokens a learned vector in place of heavy output.
        separate_norms: the heavy path normalises its gathered rows with its own norm.
        route_raw: routers read the residual stream instead of the normalised tokens.
        heavy_window: route and attend inside each light window; needs a grid that the window
            divides, and no prefix.
        init_values: LayerScale on the sum of both paths, if not None.
        drop_path: probability to drop the sublayer for an image.
        efficient_drop_path: do not compute it for the images that are dropped, see
            `stochastic_depth.py`.
        norm_layer: LayerNorm or RMSNorm class.
    """

    num_prefix: Final[int]
    shared_norm: Final[bool]
    route_raw: Final[bool]
    heavy_window: Final[bool]
    gate_queries: Final[bool]
    plain_sum: Final[bool]
    skip_dropped: Final[bool]

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        light_heads: int,
        light_head_dim: int,
        light_window: int,
        num_prefix: int = 0,
        q_capacity: float | str | Fraction = 0.25,
        kv_capacity: float | str | Fraction = 0.5,
        kv_routes: int = 1,
        kv_gate: str = "tokens",
        null_kv: bool = False,
        router: str = "learned",
        router_kwargs: Mapping[str, Any] | None = None,
        null_token: bool = False,
        separate_norms: bool = False,
        route_raw: bool = False,
        heavy_window: bool = False,
        gate_queries: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        efficient_drop_path: bool = False,
        norm_layer: type[nn.Module] = LayerNorm,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        projections: dict[str, Any] = {
            "qkv_bias": qkv_bias,
            "proj_bias": proj_bias,
            "qk_norm": qk_norm,
            "proj_drop": proj_drop,
            "norm_layer": norm_layer,
            **factory,
        }
        routing = {**(router_kwargs or {}), **(factory if router == "learned" else {})}
        self.num_prefix = num_prefix
        self.light_window = light_window
        self.shared_norm = not separate_norms
        self.route_raw = route_raw
        self.heavy_window = heavy_window
        self.gate_queries = gate_queries
        self.recompute_heavy = False  # see `RoutedBlock.set_checkpointing`
        # with a norm of its own for the heavy path, this one may have no reader left
        is_read = light_heads or not separate_norms or (router == "learned" and not route_raw)
        self.norm = norm_layer(dim, **factory) if is_read else nn.Identity()
        self.norm_heavy = norm_layer(dim, **factory) if separate_norms else nn.Identity()
        self.q_router = build_router(router, dim, q_capacity, **routing)
        self.kv_router = build_router(router, dim, kv_capacity, num_routes=kv_routes, **routing)
        self.light = (
            WindowAttention(
                dim,
                num_heads=light_heads,
                head_dim=light_head_dim,
                window=light_window,
                num_prefix=num_prefix,
                **projections,
            )
            if light_heads
            else None
        )
        self.heavy = HeavyAttention(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            kv_routes=kv_routes,
            kv_gate=kv_gate,
            null_kv=null_kv,
            attn_drop=attn_drop,
            **projections,
        )
        self.null_token = nn.Parameter(torch.zeros(dim, **factory)) if null_token else None
        self.ls = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.plain_sum = not (init_values or drop_path)  # one kernel adds it all up
        self.skip_dropped = efficient_drop_path and drop_path > 0

    @torch.jit.ignore
    def set_light_window(self, window: int) -> None:
        """Change the side of the windows; they have no weights of their own."""
        self.light_window = window
        if self.light is not None:
            self.light.window = window

    def init_weights(self) -> None:
        """The null token starts as nothing."""
        if self.null_token is not None:
            nn.init.zeros_(self.null_token)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        rope: Tensor | None = None,
        same_window: Tensor | None = None,
    ) -> Tensor:
        """x [B, P + N, D] -> like x; arguments as in `RoutedBlock.forward`."""
        if self.plain_sum:
            return self.update(x, grid, rope, same_window, residual=True)
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
            if self.skip_dropped and self.training and not isinstance(x, torch.fx.Proxy):
                return self._forward_kept(x, grid, rope, same_window)
        return x + self.drop_path(self.ls(self.update(x, grid, rope, same_window)))

    @torch.jit.ignore
    def _forward_kept(
        self,
        x: Tensor,
        grid: tuple[int, int],
        rope: Tensor | None,
        same_window: Tensor | None,
    ) -> Tensor:
        """`forward` in training, without what drop-path drops."""

        def update(part: Tensor, kept: Tensor) -> Tensor:
            own_rope = rope[kept] if rope is not None and rope.ndim == 3 else rope
            own_window = None if same_window is None else same_window[kept]
            return cast(Tensor, self.ls(self.update(part, grid, own_rope, own_window)))

        assert isinstance(self.drop_path, DropPath)
        return add_to_kept_images(x, self.drop_path.drop_prob, update)

    def update(
        self,
        x: Tensor,
        grid: tuple[int, int],
        rope: Tensor | None = None,
        same_window: Tensor | None = None,
        residual: bool = False,
    ) -> Tensor:
        """What both paths add to x, before LayerScale and drop-path; arguments as in `forward`.
        With `residual`, x plus that.
        """
        if not self.heavy_window:
            return self._attend(x, grid, rope, x if residual else None, same_window)
        height, width = grid
        window = self.light_window
        check_windows(height, width, window)
        windows = partition_windows(x, height, width, window)
        own = windows if residual else None
        windows = self._attend(windows, (window, window), None, own, None)
        return merge_windows(windows, height, width, window)

    def _attend(
        self,
        x: Tensor,
        grid: tuple[int, int],
        rope: Tensor | None,
        residual: Tensor | None,
        same_window: Tensor | None,
    ) -> Tensor:
        tokens = settle_gradient(self.norm(x))
        q_index, q_gate, kv_index, kv_gate = self._route(x if self.route_raw else tokens)
        source = tokens if self.shared_norm else x
        if self.recompute_heavy and not torch.jit.is_scripting():
            source, rows = recompute(self._heavy, source, q_index, q_gate, kv_index, kv_gate, rope)
        else:
            source, rows = self._heavy(source, q_index, q_gate, kv_index, kv_gate, rope)
        if self.shared_norm:
            tokens = source
        elif residual is not None:
            residual = source
        if self.kv_router.takes_all():
            rows = keep_in_graph(rows, kv_gate)
        light = None if self.light is None else self.light(tokens, grid, rope, same_window)
        if self.light is None and not self.shared_norm and self.q_router.takes_all():
            rows = keep_in_graph(rows, tokens)  # of the norm that nobody may read now
        if self.q_router.takes_all() and self.null_token is None:
            rows = keep_in_graph(rows, q_gate)
            rows = rows if light is None else rows + light
            return rows if residual is None else residual + rows
        base = torch.zeros_like(x) if light is None else light
        if self.null_token is not None:
            if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
                if self.light is not None and is_watched(self.light):
                    base = base.clone()
            base = base.add_(self.null_token)  # nobody else holds it
            rows = rows * q_gate.unsqueeze(-1).to(rows.dtype) - self.null_token
            q_gate = torch.ones_like(q_gate)
        return scatter_add_tokens(base, q_index, rows, q_gate, residual)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token indices (prefix first) and gates: queries [B, Q], keys [B, R, K]."""
        q_index, q_gate, kv_index, kv_gate = self._decide(x)
        q_index, q_gate = prepend_prefix(q_index.squeeze(1), q_gate.squeeze(1), self.num_prefix)
        kv_index, kv_gate = prepend_prefix(kv_index, kv_gate, self.num_prefix)
        return q_index, q_gate, kv_index, kv_gate

    def _decide(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q_logits = self.q_router(x, self.num_prefix)
        kv_logits = self.kv_router(x, self.num_prefix)
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
            if self._decides_together(x):
                routers = (cast(Router, self.q_router), cast(Router, self.kv_router))
                q, kv = decide_together(routers, [q_logits, kv_logits])
                return q[0], q[1], kv[0], kv[1]
        q_index, q_gate, _ = self.q_router.decide(q_logits)
        kv_index, kv_gate, _ = self.kv_router.decide(kv_logits)
        return q_index, q_gate, kv_index, kv_gate

    @torch.jit.ignore
    def _decides_together(self, x: Tensor) -> bool:
        """Both routers by one operator; graphs for other runtimes take them one by one."""
        if plain_pytorch() or isinstance(x, torch.fx.Proxy):
            return False
        routers = (self.q_router, self.kv_router)
        return all(isinstance(r, Router) and not r.takes_all() for r in routers)

    def _heavy(
        self,
        source: Tensor,
        q_index: Tensor,
        q_gate: Tensor,
        kv_index: Tensor,
        kv_gate: Tensor,
        rope: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Gather the routed rows and attend: the source for its next reader, and [B, Q, D], not yet
        gated.
        """
        source, queries, context = self._gather(source, q_index, kv_index)
        if self.gate_queries and not self.q_router.takes_all():
            queries = queries * q_gate.unsqueeze(-1).to(queries.dtype)
        gate = None if self.kv_router.takes_all() else kv_gate
        if rope is None:
            return source, self.heavy(queries, context, gate)
        q_rope, k_rope = take_rope(rope, q_index), take_rope(rope, kv_index)
        return source, self.heavy(queries, context, gate, q_rope, k_rope)

    def _gather(
        self, source: Tensor, q_index: Tensor, kv_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The source for its next reader; normalised rows of the queries [B, Q, D] and of each kv
        route [B, R, K, D].
        """
        all_queries, all_keys = self.q_router.takes_all(), self.kv_router.takes_all()
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
            if not (all_queries or all_keys or isinstance(source, torch.fx.Proxy)):
                source, rows = gather_rows(source, [q_index, kv_index], self.norm_heavy)
                return source, rows[0], rows[1]
        queries = self.norm_heavy(source if all_queries else gather_tokens(source, q_index))
        if all_keys:
            keys = self.norm_heavy(source).unsqueeze(1)
            return source, queries, keys.expand(-1, kv_index.shape[1], -1, -1)
        return source, queries, self.norm_heavy(gather_tokens(source, kv_index))
