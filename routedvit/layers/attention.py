"""The two attentions of a routed block: light in windows for all, heavy and global for the routed.

B images, P prefix tokens (cls, registers), N = H * W patches, D width
Q heavy queries, R kv routes with K heavy keys each
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, apply_rot_embed_cat, register_notrace_function
from torch import Tensor, nn
from torch.jit import Final

from routedvit.layers.wrapped import is_plain
from routedvit.ops import attention_among, window_attention

__all__ = ["HeavyAttention", "WindowAttention"]

register_notrace_function(window_attention)
register_notrace_function(attention_among)
register_notrace_function(apply_rot_embed_cat)

KV_GATES = ("tokens", "values", "keys_values")


class WindowAttention(nn.Module):
    """Light attention: few heads, each token attends to its own w x w window of the grid.

    Projections run on the whole sequence in raster order; the D-wide tokens are never moved into
    windows. Prefix tokens stand outside the grid: their window is themselves, so attention returns
    their own value.

    Args:
        dim: token width D.
        num_heads, head_dim: light heads and their width.
        window: side w of a window, in tokens.
        qk_norm: normalise queries and keys per head with `norm_layer`.
        num_prefix: prefix tokens P in front of the patches.
    """

    num_heads: Final[int]
    head_dim: Final[int]
    num_prefix: Final[int]
    qk_norm: Final[bool]

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        window: int,
        num_prefix: int = 0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = LayerNorm,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.window = window
        self.num_prefix = num_prefix
        self.qk_norm = qk_norm
        inner_dim = num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * inner_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = norm_layer(head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        self.proj = nn.Linear(inner_dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        rope: Tensor | None = None,
        same_window: Tensor | None = None,
    ) -> Tensor:
        """x [B, P + N, D], grid (H, W) with N = H * W, rope [P + N, 2 * head_dim]
        -> [B, P + N, D].

        With `same_window`, x holds any N patches of the grid; see `RoutedBlock.forward`.
        """
        qkv = self.qkv(x)
        if self.qk_norm or rope is not None:
            qkv = self._normalise_and_rotate(qkv, rope)
        if same_window is None:
            out = window_attention(
                qkv, grid[0], grid[1], self.window, self.num_heads, self.num_prefix
            )
        else:
            out = attention_among(qkv, same_window, self.num_heads, self.num_prefix)
        return self.proj_drop(self.proj(out))

    def _normalise_and_rotate(self, qkv: Tensor, rope: Tensor | None) -> Tensor:
        """qk-norm and rotary positions on qkv [B, P + N, 3 * inner]: they depend on the grid, not
        on the window.
        """
        batch, num_tokens = qkv.shape[0], qkv.shape[1]
        q, k, v = qkv.reshape(batch, num_tokens, 3, self.num_heads, self.head_dim).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            token_rope = rope.unsqueeze(-2)
            q = apply_rot_embed_cat(q, token_rope)
            k = apply_rot_embed_cat(k, token_rope)
        return torch.stack([q.type_as(v), k.type_as(v), v], 2).flatten(2)


class HeavyAttention(nn.Module):
    """Heavy attention: routed queries meet routed keys and values of the whole image.

    With several kv routes the heads are divided among them, in order: the heads of route r see the
    tokens of route r. The rows of `kv.weight` are ordered [head, k or v, head_dim], whatever the
    number of routes.

    Args:
        dim: token width D.
        num_heads, head_dim: heavy heads and their width.
        kv_routes: kv routes R; must divide num_heads.
        kv_gate: what the kv gate multiplies: the normalised 'tokens' as in the paper, the 'values'
            as in colt5-attention, or 'keys_values' after projection.
        null_kv: add a learned key and value per head that every query may attend to.
    """

    num_heads: Final[int]
    head_dim: Final[int]
    kv_routes: Final[int]
    gate_tokens: Final[bool]
    gate_keys: Final[bool]

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        kv_routes: int = 1,
        kv_gate: str = "tokens",
        null_kv: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = LayerNorm,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads % kv_routes:
            raise ValueError(f"num_heads={num_heads} must be a multiple of kv_routes={kv_routes}")
        if kv_gate not in KV_GATES:
            raise ValueError(f"kv_gate={kv_gate!r} is unknown; choose one of {', '.join(KV_GATES)}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.kv_routes = kv_routes
        self.gate_tokens = kv_gate == "tokens"
        self.gate_keys = kv_gate == "keys_values"
        inner_dim = num_heads * head_dim
        self.q = nn.Linear(dim, inner_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Linear(dim, 2 * inner_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.null_kv = (
            nn.Parameter(torch.empty(2, num_heads, head_dim, device=device, dtype=dtype))
            if null_kv
            else None
        )
        self.q_norm = norm_layer(head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        self.proj = nn.Linear(inner_dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.init_weights()

    def init_weights(self) -> None:
        """Null keys and values start as in colt5-attention."""
        if self.null_kv is not None:
            nn.init.normal_(self.null_kv)

    def forward(
        self,
        queries: Tensor,
        context: Tensor,
        kv_gate: Tensor | None = None,
        q_rope: Tensor | None = None,
        k_rope: Tensor | None = None,
    ) -> Tensor:
        """Attention of the routed rows.

        Args:
            queries: [B, Q, D] normalised rows.
            context: [B, R, K, D] normalised rows of each kv route.
            kv_gate: [B, R, K]; None for gates of 1.
            q_rope: [B, Q, 2 * head_dim] and k_rope: [B, R, K, 2 * head_dim], the positions of
                these rows.

        Returns:
            [B, Q, D], not yet gated.
        """
        batch, num_queries = queries.shape[0], queries.shape[1]
        q = self.q(queries).view(batch, num_queries, self.num_heads, self.head_dim).transpose(1, 2)
        if kv_gate is not None and self.gate_tokens:
            context = context * kv_gate.unsqueeze(-1).to(context.dtype)
        k, v = self._keys_values(context)
        if kv_gate is not None and not self.gate_tokens:
            gate = self._per_head(kv_gate.unsqueeze(-1).to(v.dtype))
            v = v * gate
            if self.gate_keys:
                k = k * gate
        q, k = self.q_norm(q), self.k_norm(k)
        if q_rope is not None and k_rope is not None:
            q = apply_rot_embed_cat(q, q_rope.unsqueeze(1)).type_as(v)
            k = apply_rot_embed_cat(k, self._per_head(k_rope)).type_as(v)
        if self.null_kv is not None:
            null_k, null_v = self.null_kv.unsqueeze(2).unsqueeze(1).unbind(0)
            k = torch.cat([null_k.expand(batch, -1, -1, -1), k], 2)
            v = torch.cat([null_v.expand(batch, -1, -1, -1), v], 2)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(batch, num_queries, self.num_heads * self.head_dim)
        return self.proj_drop(self.proj(out))

    def _per_head(self, x: Tensor) -> Tensor:
        """[B, R, K, ...] of the routes -> what broadcasts to [B, heads, K, ...]."""
        if self.kv_routes == 1:
            return x
        return x.repeat_interleave(self.num_heads // self.kv_routes, dim=1)

    def _keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, R, K, D] -> keys and values [B, heads, K, head_dim]."""
        batch, _, num_keys, dim = context.shape
        if self.kv_routes == 1:
            kv = self.kv(context.squeeze(1)).view(batch, num_keys, self.num_heads, 2, self.head_dim)
            k, v = kv.unbind(3)
            return k.transpose(1, 2), v.transpose(1, 2)
        heads = self.num_heads // self.kv_routes
        if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
            if not is_plain(self.kv, nn.Linear):
                # the module itself, for all heads of each route, of which the route keeps its own
                kv = self.kv(context).unflatten(-1, (self.kv_routes, heads, 2, self.head_dim))
                kv = torch.stack([kv[:, r, :, r] for r in range(self.kv_routes)], 1)
                k, v = kv.permute(4, 0, 1, 3, 2, 5).flatten(2, 3).unbind(0)
                return k, v
        # one batched GEMM, a slice of the weight for each route
        weight = self.kv.weight.view(self.kv_routes, -1, dim)
        rows = context.transpose(0, 1).reshape(self.kv_routes, -1, dim)
        if self.kv.bias is None:
            kv = rows @ weight.transpose(1, 2)
        else:
            # one operator: autocast would add an fp32 bias to a bf16 product, in fp32
            bias = self.kv.bias.view(self.kv_routes, 1, -1)
            kv = torch.baddbmm(bias, rows, weight.transpose(1, 2))
        kv = kv.view(self.kv_routes, batch, num_keys, heads, 2, self.head_dim)
        k, v = kv.permute(4, 1, 0, 3, 2, 5).flatten(2, 3).unbind(0)
        return k, v
