"""Which parts a dense vision transformer has, read from its weights, as arguments of a routed one.

The weights of a routed model are read alike under the names of the dense block that its heavy path
is, so that two models are compared part by part: what differs is what the user has to pass.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["differing_arguments", "part_arguments"]

# start of a name in a routed block -> that in the dense block; the first that fits
DENSE_NAMES = {
    "attn.norm.": "norm1.",
    "attn.norm_heavy.": "norm1.",
    "attn.ls.": "ls1.",
    "attn.heavy.q.": "attn.qkv.",
    "attn.heavy.": "attn.",
    "mlp.norm.": "norm2.",
    "mlp.norm_heavy.": "norm2.",
    "mlp.ls.": "ls2.",
    "mlp.heavy.": "mlp.",
}


def part_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments with which a routed model has the parts of these dense weights, blocks first."""
    arguments = {
        **_mlp_arguments(weights),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "proj_bias": "blocks.0.attn.proj.bias" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        # none is 0: timm.create_model drops arguments that are None
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else 0.0,
        "pre_norm": "norm_pre.weight" in weights,
        "final_norm": "norm.weight" in weights or "fc_norm.weight" in weights,
    }
    if "blocks.0.norm1.bias" not in weights:
        arguments["norm_layer"] = "rmsnorm"
    if "patch_embed.norm.weight" in weights:
        with_bias = "patch_embed.norm.bias" in weights
        arguments["embed_norm_layer"] = "layernorm" if with_bias else "rmsnorm"
    return arguments


def differing_arguments(weights: Mapping[str, Tensor], model: Any) -> dict[str, Any]:
    """Those that a `RoutedVisionTransformer` would need to have the parts of dense weights.

    The activation is left out: weights do not tell it.
    """
    if "blocks.0.mlp.fc2.weight" not in weights:
        return {}
    usual = {"norm_layer": "layernorm", "embed_norm_layer": ""}
    own = usual | part_arguments({_dense_name(name): w for name, w in model.state_dict().items()})
    wanted = usual | part_arguments(weights)
    return {key: wanted[key] for key in wanted if wanted[key] != own[key] and key != "act_layer"}


def _dense_name(name: str) -> str:
    match = re.match(r"(blocks\.\d+\.)(.+)", name)
    if match is None:
        return name
    block, rest = match.groups()
    for start, dense in DENSE_NAMES.items():
        if rest.startswith(start):
            return f"{block}{dense}{rest.removeprefix(start)}"
    return name


def _mlp_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """mlp_layer, mlp_ratio, and the act_layer that such an MLP usually has."""
    dim, hidden = weights["blocks.0.mlp.fc2.weight"].shape
    packed = len(weights.get("blocks.0.mlp.fc1.weight", ())) == 2 * hidden
    swiglu = packed or "blocks.0.mlp.fc1_g.weight" in weights
    ratio = hidden / dim
    if int(dim * ratio) < hidden:  # the layer rounds down, and so may the division
        ratio = math.nextafter(ratio, math.inf)
    return {
        "mlp_layer": "swiglu" if swiglu else "mlp",
        "act_layer": "silu" if swiglu else "gelu",
        "mlp_ratio": ratio,
    }
