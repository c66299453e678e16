"""One block of a routed vision transformer: routed attention, then routed feed-forward."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from timm.layers import Attention, LayerNorm
from torch import Tensor, nn

from routedvit.layers.checkpointing import checkpoint_routed
from routedvit.layers.routed_attention import RoutedAttention
from routedvit.layers.routed_feedforward import RoutedFeedForward

__all__ = ["RoutedBlock"]


class RoutedBlock(nn.Module):
    """Routed attention and routed feed-forward, each with its norm and residual.

    Takes the arguments with which timm's `VisionTransformer` builds a block, plus those of the two
    sublayers.

    Args:
        dim, num_heads, mlp_ratio: width D, heavy heads, heavy hidden width over D.
        head_dim: width of a heavy head; D / num_heads if None.
        light_heads: a quarter of num_heads, rounded up, if None; 0 removes light attention.
        light_head_dim: head_dim if None.
        light_window, light_mlp_ratio, q_capacity, kv_capacity, ffn_capacity, kv_routes, ...: see
            the sublayers.

    Raises:
        ValueError: heads or widths that do not divide, an unknown choice, an option of timm's
            block that has no routed counterpart.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] | None = None,
        norm_layer: type[nn.Module] = LayerNorm,
        mlp_layer: str = "mlp",
        attn_layer: type[nn.Module] = Attention,
        *,
        num_prefix: int = 0,
        head_dim: int | None = None,
        light_heads: int | None = None,
        light_head_dim: int | None = None,
        light_window: int = 7,
        light_mlp_ratio: float = 0.5,
        q_capacity: float | str | Fraction = 0.25,
        kv_capacity: float | str | Fraction = 0.5,
        ffn_capacity: float | str | Fraction = 0.25,
        kv_routes: int = 1,
        kv_gate: str = "tokens",
        null_kv: bool = False,
        null_token: bool = False,
        router: str = "learned",
        router_kwargs: Mapping[str, Any] | None = None,
        separate_norms: bool = False,
        route_raw: bool = False,
        heavy_window: bool = False,
        efficient_drop_path: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale_attn_norm or scale_mlp_norm or attn_layer is not Attention:
            raise ValueError(
                "scale_attn_norm, scale_mlp_norm and attn_layer have no routed counterpart;"
                " leave them out"
            )
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"embed_dim={dim} must be a multiple of num_heads={num_heads}")
            head_dim = dim // num_heads
        shared: dict[str, Any] = {
            "num_prefix": num_prefix,
            "router": router,
            "router_kwargs": router_kwargs,
            "separate_norms": separate_norms,
            "route_raw": route_raw,
            "proj_bias": proj_bias,
            "init_values": init_values,
            "proj_drop": proj_drop,
            "drop_path": drop_path,
            "efficient_drop_path": efficient_drop_path,
            "norm_layer": norm_layer,
            "device": device,
            "dtype": dtype,
        }
        self.attn = RoutedAttention(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            light_heads=-(-num_heads // 4) if light_heads is None else light_heads,
            light_head_dim=light_head_dim or head_dim,
            light_window=light_window,
            q_capacity=q_capacity,
            kv_capacity=kv_capacity,
            kv_routes=kv_routes,
            kv_gate=kv_gate,
            null_kv=null_kv,
            null_token=null_token,
            heavy_window=heavy_window,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            attn_drop=attn_drop,
            **shared,
        )
        self.mlp = RoutedFeedForward(
            dim,
            mlp_ratio=mlp_ratio,
            light_mlp_ratio=light_mlp_ratio,
            mlp_layer=mlp_layer,
            act_layer=act_layer,
            capacity=ffn_capacity,
            **shared,
        )
        self.set_checkpointing("none")

    @torch.jit.ignore
    def set_checkpointing(self, policy: str, check_routing: bool = False) -> None:
        """What the backward pass recomputes: 'none', the 'heavy' branches, or the whole 'block'."""
        self.recompute_block = policy == "block"
        self.check_routing = check_routing
        self.attn.recompute_heavy = self.mlp.recompute_heavy = policy == "heavy"

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        rope: Tensor | None = None,
        same_window: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: [B, P + N, D] tokens.
            grid: (H, W), N = H * W in raster order.
            rope: [P + N, 2 * head_dim] rotary table.
            same_window: None, or where x holds only some patches of the grid, N of them, and rope
                a table per image: [B, 1, N, N] bool, which of them share a light window.

        Returns:
            like x.
        """
        if self.recompute_block and not torch.jit.is_scripting():
            return checkpoint_routed(
                self._forward, x, grid, rope, same_window, check_routing=self.check_routing
            )
        return self._forward(x, grid, rope, same_window)

    def _forward(
        self, x: Tensor, grid: tuple[int, int], rope: Tensor | None, same_window: Tensor | None
    ) -> Tensor:
        return self.mlp(self.attn(x, grid, rope, same_window))
