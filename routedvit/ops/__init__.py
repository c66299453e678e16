"""Pure tensor functions of token routing: soft top-k, selection, gather, scatter, windows.

Each is a PyTorch reference with one signature; a Triton kernel of the same name may stand beside
it.
"""

from routedvit.ops.coordinate_descent import coordinate_descent
from routedvit.ops.routing import SAVED_OPS, route, select
from routedvit.ops.soft_topk import soft_topk
from routedvit.ops.tokens import gather_tokens, prepend_prefix, scatter_add_tokens
from routedvit.ops.windows import merge_windows, partition_windows, window_padding_mask

__all__ = [
    "SAVED_OPS",
    "coordinate_descent",
    "gather_tokens",
    "merge_windows",
    "partition_windows",
    "prepend_prefix",
    "route",
    "scatter_add_tokens",
    "select",
    "soft_topk",
    "window_padding_mask",
]
