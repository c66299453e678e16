"""Feed-forward sublayer of a routed block (CoLT5, arXiv 2303.09752, section 3.1) and its residual.

    x = x + light(norm(x)) + gate * heavy(norm(x)[f])

the last term added to the rows f. Prefix tokens are always heavy, with gate 1. Light and heavy
hidden widths are multiples of D.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerNorm, LayerScale, Mlp, SwiGLU
from torch import Tensor, nn
from torch.jit import Final

from routedvit.layers.checkpointing import recompute
from routedvit.layers.fixed_router import build_router
from routedvit.layers.norms import gather_rows
from routedvit.layers.router import keep_in_graph
from routedvit.layers.stochastic_depth import add_to_kept_images
from routedvit.ops import (
    gather_tokens,
    prepend_prefix,
    scatter_add_tokens,
    settle_gradient,
)

__all__ = ["MLP_LAYERS", "RoutedFeedForward"]

MLP_LAYERS = {"mlp": Mlp, "swiglu": SwiGLU}


@torch.jit.ignore
def decide_in_raster_order(router: Any, logits: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """`Router.decide` where ties, which are broken by place, are those of the raster.

    Args:
        logits: [B, R, N] of patches as they lie.
        order: [N], where the patches in raster order lie.

    Returns:
        indices [B, R, k] ascending, of places; gates [B, R, k].
    """
    index, gate, _ = router.decide(logits[..., order])
    index, rank = order[index].sort(-1)
    return index, gate.gather(-1, rank)


class RoutedFeedForward(nn.Module):
    """A narrow feed-forward for all tokens plus a wide one for the routed ones.

    Args:
        dim: token width D.
        mlp_ratio, light_mlp_ratio: heavy and light hidden width over D (light 0: no light path).
        mlp_layer: 'mlp' or 'swiglu'.
        num_prefix: prefix tokens P in front of the patches.
        capacity: share of the patches that go heavy.
        router, router_kwargs: see `build_router`.
        separate_norms, route_raw, init_values, drop_path, efficient_drop_path, norm_layer: see
            `RoutedAttention`.
    """

    num_prefix: Final[int]
    shared_norm: Final[bool]
    route_raw: Final[bool]
    plain_sum: Final[bool]
    skip_dropped: Final[bool]

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        light_mlp_ratio: float = 0.5,
        mlp_layer: str = "mlp",
        act_layer: type[nn.Module] | None = None,
        num_prefix: int = 0,
        capacity: float | str | Fraction = 0.25,
        router: str = "learned",
        router_kwargs: Mapping[str, Any] | None = None,
        separate_norms: bool = False,
        route_raw: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        efficient_drop_path: bool = False,
        norm_layer: type[nn.Module] = LayerNorm,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mlp_layer not in MLP_LAYERS:
            raise ValueError(
                f"mlp_layer={mlp_layer!r} is unknown; choose one of {', '.join(MLP_LAYERS)}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden: dict[str, Any] = {"bias": proj_bias, "drop": proj_drop, **factory}
        if act_layer is not None:
            hidden["act_layer"] = act_layer
        layer = MLP_LAYERS[mlp_layer]
        routing = {**(router_kwargs or {}), **(factory if router == "learned" else {})}
        self.num_prefix = num_prefix
        self.shared_norm = not separate_norms
        self.route_raw = route_raw
        self.recompute_heavy = False  # see `RoutedBlock.set_checkpointing`
        # with a norm of its own for the heavy path, this one may have no reader left
        is_read = light_mlp_ratio or not separate_norms or (router == "learned" and not route_raw)
        self.norm = norm_layer(dim, **factory) if is_read else nn.Identity()
        self.norm_heavy = norm_layer(dim, **factory) if separate_norms else nn.Identity()
        self.router = build_router(router, dim, capacity, **routing)
        self.light = layer(dim, int(dim * light_mlp_ratio), **hidden) if light_mlp_ratio else None
        self.heavy = layer(dim, int(dim * mlp_ratio), **hidden)
        self.ls = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.plain_sum = not (init_values or drop_path)  # one kernel adds it all up
        self.skip_dropped = efficient_drop_path and drop_path > 0

    def forward(self, x: Tensor) -> Tensor:
        """x [B, P + N, D] -> like x."""
        if self.plain_sum:
            return self.update(x, x)
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
            if self.skip_dropped and self.training and not isinstance(x, torch.fx.Proxy):
                return self._forward_kept(x)
        return x + self.drop_path(self.ls(self.update(x)))

    @torch.jit.ignore
    def _forward_kept(self, x: Tensor) -> Tensor:
        """`forward` in training, without what drop-path drops."""

        def update(part: Tensor, _: Tensor) -> Tensor:
            return cast(Tensor, self.ls(self.update(part)))

        assert isinstance(self.drop_path, DropPath)
        return add_to_kept_images(x, self.drop_path.drop_prob, update)

    def update(
        self, x: Tensor, residual: Tensor | None = None, order: Tensor | None = None
    ) -> Tensor:
        """What both paths add to x, before LayerScale and drop-path; plus the residual, if any.

        Where the patches lie otherwise than in raster order, `order` [N] is the place of each.
        """
        tokens = settle_gradient(self.norm(x))
        logits = self.router(x if self.route_raw else tokens, self.num_prefix)
        if torch.jit.is_scripting() or order is None:
            index, gate, _ = self.router.decide(logits)
        else:
            index, gate = decide_in_raster_order(self.router, logits, order)
        index, gate = prepend_prefix(index.squeeze(1), gate.squeeze(1), self.num_prefix)
        source = tokens if self.shared_norm else x
        if self.recompute_heavy and not torch.jit.is_scripting():
            source, rows = recompute(self._heavy, source, index)
        else:
            source, rows = self._heavy(source, index)
        if self.shared_norm:
            tokens = source
        elif residual is not None:
            residual = source
        if self.router.takes_all():
            rows = keep_in_graph(rows, gate)
            if self.light is None and not self.shared_norm:
                rows = keep_in_graph(rows, tokens)  # of the norm that nobody reads now
            rows = rows if self.light is None else rows + self.light(tokens)
            return rows if residual is None else residual + rows
        base = torch.zeros_like(x) if self.light is None else self.light(tokens)
        return scatter_add_tokens(base, index, rows, gate, residual)

    def _heavy(self, source: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the routed rows and transform them: the source for its next reader, and
        [B, K, D], not yet gated.
        """
        if self.router.takes_all():
            return source, self.heavy(self.norm_heavy(source))
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
            if not isinstance(source, torch.fx.Proxy):
                source, rows = gather_rows(source, [index], self.norm_heavy)
                return source, self.heavy(rows[0])
        return source, self.heavy(self.norm_heavy(gather_tokens(source, index)))
