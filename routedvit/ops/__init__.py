"""Pure tensor functions of token routing: soft top-k, selection, gather, scatter, windows.

Each is a PyTorch reference; where a file `*_triton.py` stands beside it, a Triton kernel takes its
place behind the same signature, see `backend.py`.
"""

from routedvit.ops.backend import set_backend
from routedvit.ops.coordinate_descent import coordinate_descent
from routedvit.ops.fused_tokens import settle_gradient
from routedvit.ops.gather_norm import gather_norm, gather_norm_all
from routedvit.ops.rms_norm import rms_norm
from routedvit.ops.rms_norm_linear import rms_norm_linear
from routedvit.ops.router_logits import router_logits
from routedvit.ops.routing import SAVED_OPS, route, route_all, select
from routedvit.ops.soft_topk import soft_topk
from routedvit.ops.tokens import gather_all, gather_tokens, prepend_prefix, scatter_add_tokens
from routedvit.ops.window_attention import attention_among, window_attention
from routedvit.ops.windows import (
    merge_windows,
    partition_windows,
    shared_windows,
    window_padding_mask,
)

__all__ = [
    "SAVED_OPS",
    "attention_among",
    "coordinate_descent",
    "gather_all",
    "gather_norm",
    "gather_norm_all",
    "gather_tokens",
    "merge_windows",
    "partition_windows",
    "prepend_prefix",
    "rms_norm",
    "rms_norm_linear",
    "route",
    "route_all",
    "router_logits",
    "scatter_add_tokens",
    "select",
    "set_backend",
    "settle_gradient",
    "shared_windows",
    "soft_topk",
    "window_attention",
    "window_padding_mask",
]
