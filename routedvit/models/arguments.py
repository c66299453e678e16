"""Arguments of the routed vision transformer: checked, resolved per block, handed to the blocks."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from timm.layers import LayerNorm, get_norm_layer, to_2tuple

from routedvit.layers import RoutedBlock, Router, as_ratio
from routedvit.layers.fixed_router import ROUTERS

__all__ = [
    "Capacities",
    "Capacity",
    "block_builder",
    "check_architecture",
    "check_at_least",
    "check_choice",
    "check_image",
    "check_known",
    "norm_with_eps",
    "per_block",
    "plain",
    "window_for",
]

POS_EMBEDS = ("learn", "sincos", "none")
ROUTERS_OWN = ("dim", "capacity", "num_routes", "device", "dtype")  # the block gives these
POOLS = ("", "avg", "avgmax", "max", "token", "map", "prr")

Capacity = float | str | Fraction
Capacities = Capacity | Sequence[Capacity]


def check_architecture(
    *,
    img_size: int | tuple[int, int],
    patch_size: int | tuple[int, int],
    depth: int,
    embed_dim: int,
    num_heads: int,
    head_dim: int | None,
    mlp_ratio: float,
    drop_path_rate: float,
    router: str,
    router_kwargs: Any,
    global_pool: str,
    class_token: bool,
    reg_tokens: int,
    pos_embed: str,
    rope: bool,
    patch_drop_rate: float,
    light_heads: int | None,
    light_head_dim: int | None,
    light_mlp_ratio: float,
    kv_routes: int,
    heavy_window: bool,
    dense_blocks: int,
) -> None:
    """Raises ValueError for arguments of the model that do not go together.

    They are called as the model calls them.
    """
    check_at_least(1, num_heads=num_heads, depth=depth, embed_dim=embed_dim, head_dim=head_dim)
    check_at_least(1, kv_routes=kv_routes)
    check_at_least(0, reg_tokens=reg_tokens)
    check_choice("pos_embed", pos_embed, POS_EMBEDS)
    if pos_embed == "sincos" and embed_dim % 4:
        raise ValueError(f"pos_embed='sincos' needs embed_dim={embed_dim} to be a multiple of 4")
    check_choice("global_pool", global_pool, POOLS)
    if global_pool == "token" and not class_token:
        raise ValueError("global_pool='token' needs class_token=True")
    if patch_drop_rate:
        raise ValueError("patch_drop_rate must be 0: light windows need the whole grid")
    check_image(img_size, patch_size)
    check_at_least(0, light_heads=light_heads, light_mlp_ratio=light_mlp_ratio)
    check_at_least(1, light_head_dim=light_head_dim)
    if not mlp_ratio * embed_dim >= 1:
        raise ValueError(f"mlp_ratio={mlp_ratio} leaves the heavy FFN no hidden units; 4 is usual")
    if 0 < light_mlp_ratio * embed_dim < 1:
        raise ValueError(
            f"light_mlp_ratio={light_mlp_ratio} leaves the light FFN no hidden units; 0 is for none"
        )
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={drop_path_rate} must lie in [0, 1)")
    check_router_arguments(router, router_kwargs)
    if not 0 <= dense_blocks <= depth:
        raise ValueError(f"dense_blocks={dense_blocks} must lie between 0 and depth={depth}")
    if heavy_window and (class_token or reg_tokens or rope):
        raise ValueError("heavy_window=True needs class_token=False, reg_tokens=0 and rope=False")
    width = head_dim or embed_dim // num_heads
    if rope and (width % 4 or light_head_dim not in (None, width)):
        raise ValueError(
            f"rope=True needs head_dim={width} to be a multiple of 4, and"
            f" light_head_dim={light_head_dim} to be the same or None"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}"
        )


def check_at_least(least: float, **values: float | None) -> None:
    """Raises ValueError for one that is smaller; None stands for a default."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least:g}")


def check_known(names: Iterable[str], *classes: type, ours: Sequence[str] = ("block_fn",)) -> None:
    """Raises TypeError, with the nearest name, for what no constructor of `classes` takes.

    `ours` are arguments of theirs that this model fills in.
    """
    known = [x for cls in classes for x in inspect.signature(cls).parameters if x not in ours]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
            raise TypeError(f"{classes[0].__name__} has no argument {name!r}{hint}")


def check_router_arguments(router: str, router_kwargs: Any) -> None:
    """Raises TypeError or ValueError for router_kwargs that no router would read."""
    if not isinstance(router_kwargs, Mapping | None):
        raise TypeError(f"router_kwargs={router_kwargs!r} must be a dict, such as {{'eps': 2.0}}")
    if router == "learned":
        check_known(router_kwargs or (), Router, ours=ROUTERS_OWN)
    elif router_kwargs and router in ROUTERS:  # the router refuses a kind that is unknown
        raise ValueError(
            f"router_kwargs={dict(router_kwargs)!r} is for router='learned', and {router!r} would"
            " ignore it; leave it out"
        )


def check_image(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Raises ValueError unless at least one patch fits."""
    check_at_least(1, patch_size=min(to_2tuple(patch_size)))
    pairs = zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True)
    if any(size < patch for size, patch in pairs):
        raise ValueError(f"img_size={img_size} is smaller than patch_size={patch_size}")


def norm_with_eps(norm_layer: Any, eps: float) -> Any:
    """The norm (a class or timm's name for it; LayerNorm if None) with this epsilon."""
    return partial(get_norm_layer(norm_layer) or LayerNorm, eps=eps)


def window_for(grid: tuple[int, int], light_window: int | None) -> int:
    """The side of light windows: what was asked for, or 7 as far as the grid allows.

    Raises:
        ValueError: a window larger than the grid was asked for.
    """
    if light_window is None:
        return min(7, *grid)
    if not 1 <= light_window <= min(grid):
        raise ValueError(
            f"light_window={light_window} must lie between 1 and {min(grid)}, the shorter side of"
            f" the grid of {grid[0]} x {grid[1]} patches"
        )
    return light_window


def per_block(depth: int, **capacities: Any) -> dict[str, list[Fraction]]:
    """Capacities, single or one per block -> one exact ratio per block and router."""
    ratios = {}
    for name, own in capacities.items():
        values = list(own) if isinstance(own, list | tuple) else [own] * depth
        if len(values) != depth:
            raise ValueError(f"{name}_capacity has {len(values)} entries for {depth} blocks")
        ratios[name] = [as_ratio(value, f"{name}_capacity") for value in values]
    return ratios


def plain(capacity: Any) -> Any:
    """The same capacity as JSON can hold it."""
    if isinstance(capacity, list | tuple):
        return [plain(value) for value in capacity]
    return str(capacity) if isinstance(capacity, Fraction) else capacity


def block_builder(
    routed: Callable[..., RoutedBlock], capacities: dict[str, list[Fraction]], dense_blocks: int
) -> Callable[..., RoutedBlock]:
    """What timm's constructor calls for each block; the first ones, without routing, are dense."""

    def build(depth: int, **kwargs: Any) -> RoutedBlock:
        if depth < dense_blocks:
            return routed(
                router="all_heavy", router_kwargs=None, light_heads=0, light_mlp_ratio=0, **kwargs
            )
        own = {f"{name}_capacity": ratios[depth] for name, ratios in capacities.items()}
        return routed(**own, **kwargs)

    return build
