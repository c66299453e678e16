"""The routed vision transformer: timm's `VisionTransformer` with routed blocks.

Stem, position tables, pooling, head, resizing, weight initialisation and the rest of timm's
contract are inherited. What differs is here: blocks that know the token grid, positions that timm's
class lacks (sin-cos, axial rotary), routing that can be changed (`set_capacity`) and looked at
(`routing`).

    images [B, C, H_img, W_img] -> tokens [B, P + N, D]: P prefix tokens, then N = H * W patches in
    raster order
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from timm.layers import create_rope_embed, to_2tuple
from timm.models._input import update_model_args
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.jit import Final

from routedvit.layers import RoutedBlock
from routedvit.layers.checkpointing import POLICIES
from routedvit.layers.positions import add_sincos, prefix_rope
from routedvit.models.arguments import (
    Capacities,
    block_builder,
    check_architecture,
    check_choice,
    check_image,
    check_known,
    norm_with_eps,
    per_block,
    plain,
    window_for,
)
from routedvit.models.dense_weights import converted_if_dense
from routedvit.models.feature_maps import FeatureMaps
from routedvit.models.fitting import check_fit
from routedvit.models.flops import Flops, count_flops
from routedvit.models.routing import Routing, record_routing
from routedvit.ops import gather_tokens, shared_windows

__all__ = ["RoutedVisionTransformer"]


class RoutedVisionTransformer(FeatureMaps):
    """Vision transformer with conditional compute (CoLT5 for images).

    Args:
        q_capacity, kv_capacity, ffn_capacity: share of the patches in (0, 1] that each router
            sends the heavy way, a number or a ratio such as '1/4'; a list gives one per block.
        light_heads: heads of light attention; a quarter of num_heads, rounded up, if None; 0 for
            none.
        light_window: side of a light attention window in patches, need not divide the grid; 7, or
            the whole grid where that is smaller, if None.
        light_mlp_ratio: hidden width of the light FFN over embed_dim; 0 for none.
        kv_routes: sets of heavy keys and values; the heavy heads are divided among them.
        router: 'learned', or a control: 'random', 'static', 'all_heavy', 'all_light'.
        router_kwargs: eps, fetch_ratio, scale, straight_through, solver of a learned `Router`.
        dense_blocks: the first so many blocks are dense (early layers hardly learn to route).
        pos_embed: 'learn', 'sincos' or 'none'.
        rope: axial rotary positions in light and heavy attention.
        mlp_layer: 'mlp' or 'swiglu'.
        norm_eps: of all norms, if not their default (1e-6).
        kv_gate, null_kv, null_token, separate_norms, route_raw, heavy_window, head_dim,
            light_head_dim: see `RoutedAttention` and `HeavyAttention`; with their defaults the
            block is the paper's.
        efficient_drop_path: images that drop-path drops from a sublayer are not computed there
            (DINOv2, arXiv 2304.07193): training costs less by the drop rate, which is rounded to
            whole images of a micro-batch.
        kwargs: of timm's `VisionTransformer`; num_heads and mlp_ratio are those of the heavy path.

    Raises:
        ValueError, TypeError: an argument that cannot be, with its name and the mend.
    """

    sincos: Final[bool]

    def __init__(
        self,
        *,
        q_capacity: Capacities = 0.25,
        kv_capacity: Capacities = 0.5,
        ffn_capacity: Capacities = 0.25,
        light_heads: int | None = None,
        light_head_dim: int | None = None,
        light_window: int | None = None,
        light_mlp_ratio: float = 0.5,
        head_dim: int | None = None,
        kv_routes: int = 1,
        kv_gate: str = "tokens",
        null_kv: bool = False,
        null_token: bool = False,
        router: str = "learned",
        router_kwargs: dict[str, Any] | None = None,
        separate_norms: bool = False,
        route_raw: bool = False,
        heavy_window: bool = False,
        efficient_drop_path: bool = False,
        dense_blocks: int = 0,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        global_pool: str = "avg",
        class_token: bool = False,
        reg_tokens: int = 4,
        pos_embed: str = "learn",
        rope: bool = False,
        mlp_layer: str = "mlp",
        norm_eps: float | None = None,
        patch_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_known(kwargs, RoutedVisionTransformer, VisionTransformer)
        check_architecture(
            img_size=img_size, patch_size=patch_size, depth=depth, embed_dim=embed_dim,
            num_heads=num_heads, head_dim=head_dim, mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate, router=router, router_kwargs=router_kwargs,
            global_pool=global_pool, class_token=class_token, reg_tokens=reg_tokens,
            pos_embed=pos_embed, rope=rope, patch_drop_rate=patch_drop_rate,
            light_heads=light_heads, light_head_dim=light_head_dim,
            light_mlp_ratio=light_mlp_ratio, kv_routes=kv_routes, heavy_window=heavy_window,
            dense_blocks=dense_blocks,
        )  # fmt: skip
        if norm_eps is not None:
            kwargs["norm_layer"] = norm_with_eps(kwargs.get("norm_layer"), norm_eps)
            if kwargs.get("embed_norm_layer"):
                kwargs["embed_norm_layer"] = norm_with_eps(kwargs["embed_norm_layer"], norm_eps)
        capacities = per_block(depth, q=q_capacity, kv=kv_capacity, ffn=ffn_capacity)
        routed = partial(
            RoutedBlock,
            num_prefix=int(class_token) + reg_tokens,
            light_heads=light_heads,
            light_head_dim=light_head_dim,
            light_window=1,  # resolved below, when the grid is known
            light_mlp_ratio=light_mlp_ratio,
            head_dim=head_dim,
            kv_routes=kv_routes,
            kv_gate=kv_gate,
            null_kv=null_kv,
            null_token=null_token,
            router=router,
            router_kwargs=router_kwargs,
            separate_norms=separate_norms,
            route_raw=route_raw,
            heavy_window=heavy_window,
            efficient_drop_path=efficient_drop_path,
        )
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            global_pool=cast(Any, global_pool),
            class_token=class_token,
            reg_tokens=reg_tokens,
            pos_embed="learn" if pos_embed == "learn" else "none",
            mlp_layer=cast(Any, mlp_layer),
            block_fn=cast(Any, block_builder(routed, capacities, dense_blocks)),
            weight_init="skip",
            device=device,
            dtype=dtype,
            **kwargs,
        )
        # a Sequential could not pass the grid on
        self.blocks = cast(Any, nn.ModuleList(self.blocks))
        self.light_window = light_window
        self.sincos = pos_embed == "sincos"
        self.rope: Any = (
            create_rope_embed(
                dim=(head_dim or embed_dim // num_heads) * num_heads,
                num_heads=num_heads,
                in_pixels=False,
                feat_shape=None if self.dynamic_img_size else list(self.patch_embed.grid_size),
                device=device,
            )
            if rope
            else None
        )
        self._set_light_window()
        self.weight_init_mode = cast(Any, "reset" if weight_init == "skip" else weight_init)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    # --- forward ---------------------------------------------------------------------------------

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Images -> tokens [B, P + N, D], their grid, the rotary table [P + N, 2 * head_dim]."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else self.patch_embed.grid_size
        if self.sincos:
            x = add_sincos(x, grid[0], grid[1])
        x = self.norm_pre(self._pos_embed(x))
        if self.rope is None:
            return x, grid, None
        table = self.rope.get_embed([grid[0], grid[1]])
        return x, grid, prefix_rope(table, self.num_prefix_tokens)

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images [B, C, H_img, W_img] -> normalised tokens [B, P + N, D]."""
        x, grid, rope = self._embed(x)
        for block in self.blocks:
            x = block(x, grid, rope)
        return self.norm(x)

    @torch.jit.ignore
    def encode_visible(self, x: Tensor, visible: Tensor) -> Tensor:
        """Normalised tokens [B, P + V, D] of some patches, as if there were no others.

        The other patches leave after the position embedding, so the blocks cost what V patches
        cost; capacities count the V patches, light attention sees those of its window. For
        masked autoencoding (2111.06377). The last norm is applied wherever the model has it.

        Args:
            x: images [B, C, H_img, W_img].
            visible: int64 [B, V], patches in raster order, ascending.

        Raises:
            ValueError: heavy attention works inside windows.
        """
        window = self._routed_blocks()[0].attn.light_window
        if self._routed_blocks()[0].attn.heavy_window:
            raise ValueError("heavy_window=True needs all patches of a window: set it to False")
        x, grid, rope = self._embed(x)
        prefix = torch.arange(self.num_prefix_tokens, device=x.device).expand(len(x), -1)
        rows = torch.cat([prefix, visible + self.num_prefix_tokens], 1)
        x = gather_tokens(x, rows)
        rope = None if rope is None else rope[rows]
        same_window = shared_windows(visible, grid[1], window)
        for block in self.blocks:
            x = block(x, grid, rope, same_window)
        return self.fc_norm(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images [B, C, H_img, W_img] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    # --- routing ---------------------------------------------------------------------------------

    @torch.jit.ignore
    def _routed_blocks(self) -> list[RoutedBlock]:
        return [cast(RoutedBlock, block) for block in self.blocks]

    @torch.jit.ignore
    def routers(self) -> dict[str, Any]:
        """Routers by place, in depth order: 'blocks.0.q', 'blocks.0.kv', 'blocks.0.ffn', ..."""
        routers: dict[str, Any] = {}
        for i, block in enumerate(self._routed_blocks()):
            routers[f"blocks.{i}.q"] = block.attn.q_router
            routers[f"blocks.{i}.kv"] = block.attn.kv_router
            routers[f"blocks.{i}.ffn"] = block.mlp.router
        return routers

    @torch.jit.ignore
    def routing(self, images: Tensor) -> dict[str, Routing]:
        """What every router decides for these images, see `record_routing`."""
        return record_routing(self, images)

    @torch.jit.ignore
    def set_capacity(
        self,
        capacity: Capacities | None = None,
        *,
        q: Capacities | None = None,
        kv: Capacities | None = None,
        ffn: Capacities | None = None,
    ) -> None:
        """Change the share of heavy patches, of all routers or of the named ones.

        A list gives one share per block. The new capacity is exported with the weights.
        """
        chosen = {"q": q, "kv": kv, "ffn": ffn}
        chosen = {name: capacity if own is None else own for name, own in chosen.items()}
        chosen = {name: own for name, own in chosen.items() if own is not None}
        if not chosen:
            raise TypeError("set_capacity() needs a capacity, or one of q, kv, ffn")
        routers = self.routers()
        for name, ratios in per_block(len(self.blocks), **chosen).items():
            for i, ratio in enumerate(ratios):
                routers[f"blocks.{i}.{name}"].set_capacity(ratio)
        update_model_args(self, **{f"{name}_capacity": plain(own) for name, own in chosen.items()})

    @torch.jit.ignore
    def flops(
        self, img_size: int | tuple[int, int] | None = None, *, training: bool = False
    ) -> Flops:
        """FLOPs of one image, forward (a multiply-add is 2): light, heavy, router, per block.

        With `training`, the mean of an image that `efficient_drop_path` spares some sublayers.
        """
        return count_flops(self, img_size, training=training)

    # --- timm's contract -------------------------------------------------------------------------

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Weights of this model, or of a dense vision transformer (see `models.dense_weights`).

        Raises:
            MisfitError: the weights of another model, with the names that differ and the mend.
        """
        state_dict = converted_if_dense(state_dict, self)
        if strict:
            check_fit(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    @torch.jit.ignore
    def set_grad_checkpointing(
        self,
        enable: bool = True,
        policy: str = "block",
        every: int = 1,
        check_routing: bool = False,
    ) -> None:
        """Trade compute for memory; routing is never recomputed, and gradients do not change.

        Args:
            enable: False is policy 'none'.
            policy: 'none', 'heavy' (recompute the heavy branches) or 'block' (recompute the whole
                block).
            every: apply the policy to each n-th block only.
            check_routing: for debugging: route again in the recompute and raise if the indices
                differ.
        """
        check_choice("policy", policy, POLICIES)
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self.grad_checkpointing = enable and policy != "none"
        for i, block in enumerate(self._routed_blocks()):
            chosen = enable and i % every == 0
            block.set_checkpointing(policy if chosen else "none", check_routing)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Router vectors too: decay would pull the spread of their logits, 1 at the start, to 0."""
        own = {"blocks.*router.weight", "blocks.*null_token", "blocks.*null_kv"}
        return {"pos_embed", "cls_token", "reg_token"} | own

    def fix_init_weight(self) -> None:
        """Scale what each sublayer adds by depth (timm's `fix_init`)."""
        with torch.no_grad():
            for i, block in enumerate(self._routed_blocks()):
                block.attn.heavy.proj.weight.div_((2.0 * (i + 1)) ** 0.5)
                block.mlp.heavy.fc2.weight.div_((2.0 * (i + 1)) ** 0.5)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image or patch size; position tables and patch kernel are resampled.

        Raises:
            ValueError: no patch or no `light_window` fits the new size; nothing is changed then.
        """
        size = to_2tuple(img_size or self.patch_embed.img_size)
        patch = to_2tuple(patch_size or self.patch_embed.patch_size)
        check_image(size, patch)
        window_for((size[0] // patch[0], size[1] // patch[1]), self.light_window)
        super().set_input_size(img_size, patch_size)
        if self.rope is not None and not self.dynamic_img_size:
            self.rope.update_feat_shape(list(self.patch_embed.grid_size))
        self._set_light_window()
        # a variant's own window was chosen for the size it was built with
        update_model_args(self, light_window=self.light_window)

    @torch.jit.ignore
    def _set_light_window(self) -> None:
        window = window_for(self.patch_embed.grid_size, self.light_window)
        for block in self._routed_blocks():
            block.attn.set_light_window(window)
