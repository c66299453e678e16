"""The routed layers under the names, arguments and weights of the PyPI package `colt5-attention`.

Each part here owns one of our layers with the switches set as in that package: routers that read
the raw residual stream with unscaled logits, coordinate descent, straight-through gates, a fixed
number of heavy tokens, a norm for each path, null tokens, and heavy attention that stays inside its
window. State dicts are translated by renaming alone, so `state_dict(keep_vars=True)` gives our own
parameters under the package's names.

Left out: masks, cross attention and autoregressive attention, which images do not need, and the
attentions over sequences, whose light path (`local-attention`) is none of our layers.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from routedvit.layers.folded_norms import RmsNormLinear
from routedvit.layers.norms import RmsNorm, gather_rows
from routedvit.layers.renamed import Renamed
from routedvit.layers.routed_attention import RoutedAttention
from routedvit.layers.routed_feedforward import RoutedFeedForward
from routedvit.layers.router import Router

__all__ = ["ConditionalRoutedFeedForward", "ConditionalRoutedImageAttention"]

# what `CoordinateDescentRouter` of colt5-attention takes in router_kwargs, with its defaults
ROUTER_DEFAULTS: dict[str, Any] = {
    "n_iters": 20,
    "fetch_k_ratio": 9 / 8,
    "eps": 0.03,
    "eps_decay": 0.7,
    "eps_init": 4.0,
    "cosine_sim_routing": False,
    "cosine_sim_scale": 8,
    "use_triton": False,
    "triton_checkpoint_segments": None,  # memory of its Triton kernel; ours needs none
}

# their RMSNorm has no epsilon in the mean square
_norm = cast(type[nn.Module], partial(RmsNorm, eps=1e-12))


def _their_router(router_kwargs: Mapping[str, Any] | None, use_triton: bool) -> dict[str, Any]:
    """router_kwargs with their defaults.

    Raises:
        TypeError: an argument that the router does not take.
    """
    given = dict(router_kwargs or {})
    if unknown := sorted(given.keys() - ROUTER_DEFAULTS.keys()):
        raise TypeError(
            f"router_kwargs has no {', '.join(map(repr, unknown))} here;"
            f" choose from {', '.join(ROUTER_DEFAULTS)}"
        )
    given["use_triton"] = use_triton or given.get("use_triton", False)
    return {**ROUTER_DEFAULTS, **given}


def _our_router(theirs: Mapping[str, Any], straight_through: bool) -> dict[str, Any]:
    """Arguments of `Router`."""
    cosine = theirs["cosine_sim_routing"]
    return {
        "solver": "coordinate_descent",
        "straight_through": straight_through,
        "scale": float(theirs["cosine_sim_scale"]) if cosine else 1.0,
        "cosine": cosine,
        "num_iterations": theirs["n_iters"],
        "fetch_ratio": theirs["fetch_k_ratio"],
        "eps": theirs["eps"],
        "eps_decay": theirs["eps_decay"],
        "eps_init": theirs["eps"] if theirs["eps_init"] is None else theirs["eps_init"],
    }


def _set_number(router: nn.Module, name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name}={number} must be at least 1")
    cast(Router, router).set_number(number)


def _fold_norm(layer: nn.Module, light: nn.Module, first: str) -> None:
    """Give the norm, which only the light path reads, to the light path's `first` linear layer."""
    setattr(light, first, RmsNormLinear(layer.norm, getattr(light, first)))  # type: ignore[arg-type]
    layer.norm = nn.Identity()


class ConditionalRoutedFeedForward(Renamed):
    """`colt5_attention.ConditionalRoutedFeedForward`: what it adds to the residual stream.

    Args:
        dim: token width D.
        num_heavy_tokens: tokens of an image that go heavy; all where there are fewer.
        light_ff_mult, heavy_ff_mult: hidden widths over D.
        router_straight_through: gates of value 1 with the gradient of the soft ones.
        router_kwargs: n_iters, fetch_k_ratio, eps, eps_decay, eps_init, cosine_sim_routing,
            cosine_sim_scale of the router.
        use_triton: on a GPU, insist on the Triton kernel of coordinate descent; without it, that
            kernel runs wherever the backend is Triton. Makes no difference on a CPU.

    Raises:
        TypeError: unknown router_kwargs.
        ValueError: a number of tokens below 1.
    """

    names: ClassVar[dict[str, str]] = {
        "layer.router.weight": "router.routing_token",
        "layer.light.fc1.norm_weight": "light_ff.0.gamma",
        "layer.light.fc1.weight": "light_ff.1.weight",
        "layer.light.fc1.bias": "light_ff.1.bias",
        "layer.light.fc2.weight": "light_ff.3.weight",
        "layer.light.fc2.bias": "light_ff.3.bias",
        "layer.norm_heavy.weight": "heavy_ff.0.gamma",
        "layer.heavy.fc1.weight": "heavy_ff.1.weight",
        "layer.heavy.fc1.bias": "heavy_ff.1.bias",
        "layer.heavy.fc2.weight": "heavy_ff.3.weight",
        "layer.heavy.fc2.bias": "heavy_ff.3.bias",
    }
    layer: RoutedFeedForward

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens: int,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        use_triton: bool = False,
    ) -> None:
        theirs = _their_router(router_kwargs, use_triton)
        layer = RoutedFeedForward(
            dim,
            mlp_ratio=heavy_ff_mult,
            light_mlp_ratio=light_ff_mult,
            router_kwargs=_our_router(theirs, router_straight_through),
            separate_norms=True,
            route_raw=True,
            norm_layer=_norm,
        )
        _fold_norm(layer, cast(nn.Module, layer.light), "fc1")
        super().__init__(layer, theirs["use_triton"])
        _set_number(layer.router, "num_heavy_tokens", num_heavy_tokens)

    def forward(self, x: Tensor, residual: bool = False, order: Tensor | None = None) -> Tensor:
        """x [B, N, D] -> like x: what is to be added to it, or with `residual` the sum; `order` as
        in `RoutedFeedForward.update`.
        """
        self.insist_on_triton(x)
        return self.layer.update(x, x if residual else None, order)


class _ForeignContext(RoutedAttention):
    """With R > 1 kv routes colt5-attention indexes a batch that it has repeated R times as if it
    had not: window i takes its keys and values out of window i // R. Its numbers need that too.
    """

    def _gather(
        self, source: Tensor, q_index: Tensor, kv_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        routes, num_keys = kv_index.shape[1], kv_index.shape[2]
        if routes == 1 or num_keys == source.shape[1]:  # it indexes nothing where all are keys
            return super()._gather(source, q_index, kv_index)
        source, (queries,) = gather_rows(source, [q_index], self.norm_heavy)
        foreign = source.repeat_interleave(routes, 0)[: source.shape[0]]
        _, (context,) = gather_rows(foreign, [kv_index], self.norm_heavy)
        return source, queries, context


class ConditionalRoutedImageAttention(Renamed):
    """`colt5_attention.ConditionalRoutedImageAttention`: what it adds to the residual stream.

    With several kv routes windows, and so images, of a batch mix, as they do there; with one route
    no image sees another.

    Args:
        dim: token width D.
        num_heavy_tokens_q, num_heavy_tokens_kv: tokens of a window that are heavy queries, and
            heavy keys of each kv route; all where there are fewer.
        num_routed_kv: kv routes; must divide heavy_heads.
        light_dim_head, light_heads, heavy_dim_head, heavy_heads: attention heads and their widths.
        light_window_size: side of a window; must divide the image.
        router_straight_through, router_kwargs, use_triton: see `ConditionalRoutedFeedForward`.
        multiply_keys_by_score, multiply_queries_by_score: gate keys as well as values, and queries
            as well as their output.
        use_null_q_tokens: unselected tokens get a learned vector from the heavy path.
        use_flash_attn: accepted; attention always runs PyTorch's fused operator.
        channel_first: images are [B, D, H, W].

    Raises:
        TypeError: unknown router_kwargs.
        ValueError: heads that the routes do not divide, a number of tokens below 1.
    """

    names: ClassVar[dict[str, str]] = {
        "layer.null_token": "null_q_token",
        "layer.light.qkv.norm_weight": "light_attn.norm.gamma",
        "layer.light.qkv.weight": "light_attn.to_qkv.weight",
        "layer.light.proj.weight": "light_attn.to_out.weight",
        "layer.q_router.weight": "q_router.routing_token",
        "layer.kv_router.weight": "kv_router.routing_token",
        "layer.heavy.null_kv": "heavy_attn.null_kv",
        "layer.norm_heavy.weight": "heavy_attn.norm.gamma",
        "layer.heavy.q.weight": "heavy_attn.to_q.weight",
        "layer.heavy.kv.weight": "heavy_attn.to_kv.weight",
        "layer.heavy.proj.weight": "heavy_attn.to_out.weight",
    }
    layer: RoutedAttention

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: int,
        num_heavy_tokens_kv: int,
        num_routed_kv: int = 1,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_triton: bool = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
        channel_first: bool = False,
    ) -> None:
        if heavy_heads % num_routed_kv:
            raise ValueError(
                f"heavy_heads={heavy_heads} must be a multiple of num_routed_kv={num_routed_kv}"
            )
        theirs = _their_router(router_kwargs, use_triton)
        layer = _ForeignContext(
            dim,
            num_heads=heavy_heads,
            head_dim=heavy_dim_head,
            light_heads=light_heads,
            light_head_dim=light_dim_head,
            light_window=light_window_size,
            kv_routes=num_routed_kv,
            kv_gate="keys_values" if multiply_keys_by_score else "values",
            null_kv=True,
            router_kwargs=_our_router(theirs, router_straight_through),
            null_token=use_null_q_tokens,
            separate_norms=True,
            route_raw=True,
            heavy_window=True,
            gate_queries=multiply_queries_by_score,
            qkv_bias=False,
            proj_bias=False,
            norm_layer=_norm,
        )
        _fold_norm(layer, cast(nn.Module, layer.light), "qkv")
        super().__init__(layer, theirs["use_triton"])
        self.channel_first = channel_first
        _set_number(layer.q_router, "num_heavy_tokens_q", num_heavy_tokens_q)
        _set_number(layer.kv_router, "num_heavy_tokens_kv", num_heavy_tokens_kv)
        self.init_weights()

    def init_weights(self) -> None:
        """The null token, which starts as nothing elsewhere."""
        if self.layer.null_token is not None:
            nn.init.normal_(self.layer.null_token)

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        """x [B, H, W, D], or [B, D, H, W] if channel_first -> like x: what is to be added to it, or
        with `residual` the sum.
        """
        self.insist_on_triton(x)
        if self.channel_first:
            x = x.permute(0, 2, 3, 1)
        grid = (x.shape[1], x.shape[2])
        out = self.layer.update(x.flatten(1, 2), grid, residual=residual).unflatten(1, grid)
        return out.permute(0, 3, 1, 2) if self.channel_first else out
