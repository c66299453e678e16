"""`ConditionalRoutedViT` of the PyPI package `colt5-attention`, made of this project's layers.

Same constructor arguments, same state dict in both directions, same numbers (outputs within 1e-5,
parameter gradients within 1e-4 relative), so that weights and results obtained with that package
live on. It differs from `RoutedVisionTransformer` by switches of the layers, listed in
`routedvit.layers.conditional_routed`, and by its stem and head, which are here. One difference on
purpose: windows with no more tokens than go heavy work instead of failing. Its faults that change
numbers are kept: with several kv routes the images of a batch mix.

For new work take `colt5_vit_*`: here heavy attention never leaves its window.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from einops.layers.torch import Rearrange, Reduce
from timm.layers import to_2tuple
from timm.models import named_apply
from torch import Tensor, nn

from routedvit.layers.conditional_routed import (
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
)
from routedvit.layers.folded_norms import LayerNormLinear
from routedvit.layers.renamed import Renamed, saved_names, use_package_names
from routedvit.layers.routed_attention import check_windows
from routedvit.models.arguments import check_at_least
from routedvit.models.fitting import check_fit
from routedvit.ops import partition_windows

__all__ = ["ConditionalRoutedViT"]


class _PatchEmbedding(Renamed):
    """Patches of images, normalised, projected and normalised again: `to_patch_embedding`.

    Args:
        channels, patch: of an image, and (height, width) of a patch in pixels.
        dim: token width D.
    """

    names: ClassVar[dict[str, str]] = {
        "layer.1.norm_weight": "1.weight",
        "layer.1.norm_bias": "1.bias",
        "layer.1.weight": "2.weight",
        "layer.1.bias": "2.bias",
        "layer.2.weight": "3.weight",
        "layer.2.bias": "3.bias",
    }

    def __init__(self, channels: int, patch: tuple[int, int], dim: int) -> None:
        height, width = patch
        layer = nn.Sequential(
            Rearrange("b c (h p1) (w p2) -> b h w (p1 p2 c)", p1=height, p2=width),
            LayerNormLinear(channels * height * width, dim),
            nn.LayerNorm(dim),
        )
        super().__init__(layer)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H_img, W_img] -> [B, H, W, D]."""
        return cast(Tensor, self.layer(images))


class ConditionalRoutedViT(nn.Module):
    """Routed vision transformer with the interface of `colt5_attention.ConditionalRoutedViT`.

    The names in its state dict are that package's, not the paths that `named_parameters()` gives.
    `load_state_dict` takes either. Tools that look parameters up by the names in a state dict need
    paths there, see `use_package_names`.

    Args:
        image_size, patch_size: pixels, one number or (height, width). Images of another size work
            if the patches and the windows divide them.
        num_classes, channels: logits, and channels of an image.
        dim, depth: token width D, a multiple of 4, and number of blocks.
        attn_num_heavy_tokens_q, attn_num_heavy_tokens_kv: heavy queries and keys of a window.
        attn_heavy_dim_head, attn_heavy_heads, attn_light_dim_head, attn_light_heads: heads.
        attn_light_window_size: side of a window in patches.
        ff_num_heavy_tokens: tokens of an image that the heavy feed-forward sees.
        ff_heavy_mult, ff_light_mult: hidden widths over D.
        router_straight_through: gates of value 1 with the gradient of the soft ones.
        router_kwargs: n_iters, fetch_k_ratio, eps, eps_decay, eps_init, cosine_sim_routing,
            cosine_sim_scale of all routers.
        router_use_triton: on a GPU, insist on the Triton kernel of coordinate descent; makes no
            difference on a CPU.
        flash_attn: accepted; attention always runs PyTorch's fused operator.
        attn_num_routed_kv: kv routes; must divide attn_heavy_heads.
        default_coor_descent_eps: eps of the routers unless router_kwargs says otherwise.

    Raises:
        TypeError: unknown router_kwargs.
        ValueError: sizes, heads or numbers of tokens that do not fit, with the mend.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        attn_num_heavy_tokens_q: int,
        attn_num_heavy_tokens_kv: int,
        attn_heavy_dim_head: int,
        attn_heavy_heads: int,
        attn_light_dim_head: int,
        attn_light_heads: int,
        attn_light_window_size: int,
        ff_num_heavy_tokens: int,
        ff_heavy_mult: float,
        ff_light_mult: float,
        channels: int = 3,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        router_use_triton: bool = False,
        flash_attn: bool = True,
        attn_num_routed_kv: int = 1,
        default_coor_descent_eps: float = 1.0,
    ) -> None:
        super().__init__()
        patch_height, patch_width = to_2tuple(patch_size)
        check_at_least(
            1, image_size=min(to_2tuple(image_size)), patch_size=min(patch_height, patch_width),
            channels=channels, attn_heavy_dim_head=attn_heavy_dim_head,
            attn_heavy_heads=attn_heavy_heads, attn_light_dim_head=attn_light_dim_head,
            attn_light_heads=attn_light_heads, attn_light_window_size=attn_light_window_size,
            attn_num_routed_kv=attn_num_routed_kv,
        )  # fmt: skip
        if not ff_light_mult > 0:
            raise ValueError(f"ff_light_mult={ff_light_mult} must be positive; 0.5 is usual")
        _check_sizes(
            to_2tuple(image_size), (patch_height, patch_width), attn_light_window_size, dim
        )
        if attn_heavy_heads % attn_num_routed_kv:
            raise ValueError(
                f"attn_heavy_heads={attn_heavy_heads} must be a multiple of"
                f" attn_num_routed_kv={attn_num_routed_kv}"
            )
        self.to_patch_embedding = _PatchEmbedding(channels, (patch_height, patch_width), dim)
        routing: dict[str, Any] = {
            "router_straight_through": router_straight_through,
            "router_kwargs": {"eps": default_coor_descent_eps, **(router_kwargs or {})},
            "use_triton": router_use_triton,
        }
        layers = nn.ModuleList()
        for _ in range(depth):
            attention = ConditionalRoutedImageAttention(
                dim,
                num_heavy_tokens_q=attn_num_heavy_tokens_q,
                num_heavy_tokens_kv=attn_num_heavy_tokens_kv,
                num_routed_kv=attn_num_routed_kv,
                light_dim_head=attn_light_dim_head,
                light_heads=attn_light_heads,
                light_window_size=attn_light_window_size,
                heavy_dim_head=attn_heavy_dim_head,
                heavy_heads=attn_heavy_heads,
                use_flash_attn=flash_attn,
                **routing,
            )
            feed_forward = ConditionalRoutedFeedForward(
                dim,
                num_heavy_tokens=ff_num_heavy_tokens,
                light_ff_mult=ff_light_mult,
                heavy_ff_mult=ff_heavy_mult,
                **routing,
            )
            layers.append(nn.ModuleList([attention, feed_forward]))
        self.window = attn_light_window_size
        self.transformer = nn.ModuleDict({"layers": layers})
        self.linear_head = nn.Sequential(
            Reduce("b h w c -> b c", "mean"), nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        )

    def forward(self, img: Tensor) -> Tensor:
        """Images [B, channels, H_img, W_img] -> logits [B, num_classes]."""
        x = self.to_patch_embedding(img)
        x = x + _sincos(x)
        batch, height, width, dim = x.shape
        side = self.window
        check_windows(height, width, side)
        # Windows lie one after the other, each an image to its attention, for the whole depth: that
        # saves a copy of all tokens on the way in and out of every block. The mean does not mind.
        x = partition_windows(x.flatten(1, 2), height, width, side)
        places = torch.arange(height * width, device=x.device).view(1, -1, 1)
        order = partition_windows(places, height, width, side).flatten().argsort()
        for attention, feed_forward in cast(Any, self.transformer["layers"]):
            x = attention(x.unflatten(1, (side, side)), residual=True).view_as(x)
            tokens = x.view(batch, height * width, dim)
            x = feed_forward(tokens, residual=True, order=order).view_as(x)
        return self.linear_head(x.view(batch, height, width, dim))

    def init_weights(self) -> None:
        """Fresh weights, as after the constructor, for a model that was made on the meta device."""
        named_apply(_init_own, self)

    def use_package_names(self, use: bool = True) -> None:
        """Whether state dicts are saved under the names of colt5-attention.

        With False they are saved under the paths of the parameters, as tools want it that look
        parameters up by these names: `get_state_dict` and `set_state_dict` of
        torch.distributed.checkpoint, `torch.func.functional_call(model, model.state_dict(), ...)`.
        """
        use_package_names(self, use)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Weights saved by this class or by colt5-attention.

        Raises:
            MisfitError: the weights of another model, with the names that do not fit.
        """
        if strict:
            check_fit(self, saved_names(self, state_dict))
        result = super().load_state_dict(state_dict, strict, assign)
        return type(result)(*(list(saved_names(self, dict.fromkeys(keys))) for keys in result))


def _init_own(module: nn.Module, name: str) -> None:
    """The weights that a module holds itself; `name` is for timm."""
    init: Any = getattr(module, "init_weights", None) or getattr(module, "reset_parameters", None)
    if init is not None:
        init()


def _check_sizes(image: tuple[int, int], patch: tuple[int, int], window: int, dim: int) -> None:
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(f"image_size={image} must be a multiple of patch_size={patch}")
    height, width = image[0] // patch[0], image[1] // patch[1]
    if height % window or width % window:
        raise ValueError(
            f"attn_light_window_size={window} must divide the grid of {height} x {width} patches"
        )
    if dim % 4 or dim < 8:
        raise ValueError(f"dim={dim} must be a multiple of 4, at least 8, for sin-cos positions")


def _sincos(x: Tensor) -> Tensor:
    """Positions [H, W, D] of x [B, H, W, D]: sin and cos of the column, then of the row.

    timm's table orders them otherwise and has other frequencies: these fall from 1 to 1/10000,
    both included.
    """
    height, width, dim = x.shape[1:]
    frequency = torch.arange(dim // 4, device=x.device) / (dim // 4 - 1)
    frequency = 1.0 / (10000**frequency)
    row = (torch.arange(height, device=x.device)[:, None] * frequency)[:, None]
    column = (torch.arange(width, device=x.device)[:, None] * frequency)[None]
    parts = [column.sin(), column.cos(), row.sin(), row.cos()]
    return torch.cat([part.expand(height, width, -1) for part in parts], -1).to(x.dtype)
