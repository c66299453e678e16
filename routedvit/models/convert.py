"""From a trained dense vision transformer to a routed one that begins where it ended.

The arguments of the routed model (tokens, positions, pooling, LayerScale, MLP, ...) are read from
the dense one, so that at capacity 1, the default here, both compute the same. Lower it with
`set_capacity` to train on: at capacity 1 itself routers have no gradient. What becomes of each
weight is in `dense_weights.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import timm
import timm.models
from timm.layers import get_act_layer
from timm.models.vision_transformer import VisionTransformer
from timm.utils import unwrap_model
from torch import Tensor, nn

from routedvit.models.dense_check import check_blocks, check_heads
from routedvit.models.dense_parts import part_arguments
from routedvit.models.dense_weights import from_dense, source_grid, unwrap
from routedvit.models.routed_vit import RoutedVisionTransformer

__all__ = ["convert_dense", "dense_arguments"]

FULL = {"q_capacity": 1, "kv_capacity": 1, "ffn_capacity": 1}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")


def convert_dense(
    dense: nn.Module | Mapping[str, Any],
    name: str,
    *,
    report: Callable[[str], object] | None = print,
    **kwargs: Any,
) -> RoutedVisionTransformer:
    """A routed model with the weights of a dense one, and its outputs at capacity 1.

    Args:
        dense: a timm `VisionTransformer`, or its state dict: AugReg, DeiT III, DINOv2 with
            registers, ... The model tells more than the state dict, for which the pooling is
            assumed (the class token if there is one, else the average), a square grid, GELU (SiLU
            if gated) and norms with eps 1e-6.
        name: routed model of the same width, depth and heads, such as 'colt5_vit_b'.
        report: what to do with the report of where each weight went; None for nothing.
        kwargs: arguments of the routed model, which win over those read from the dense one; with
            another img_size or patch_size positions and kernels are resampled.

    Raises:
        ValueError: another kind of model, or weights that do not fit, with their names and the
            mend.
        TypeError: an argument that the model does not take.
    """
    if isinstance(dense, nn.Module):
        dense = _vision_transformer(dense)
    module: Any = dense if isinstance(dense, nn.Module) else None
    weights = unwrap(dense.state_dict() if isinstance(dense, nn.Module) else dense)
    if not timm.models.is_model_in_modules(name, ["colt5_vit"]):
        known = ", ".join(timm.list_models(module="colt5_vit"))
        raise ValueError(f"name={name!r} is no routed model; choose one of {known}")
    arguments = {**FULL, **dense_arguments(weights, module), **kwargs}
    model = cast(RoutedVisionTransformer, timm.create_model(name, **arguments))
    grid = None if module is None else module.patch_embed.grid_size
    state, transfer = from_dense(weights, model, grid)
    if module is not None:
        check_heads(module, model)
        model.train(module.training)
    model.load_state_dict(state)
    if report is not None:
        report(str(transfer))
    return model


def _vision_transformer(dense: nn.Module) -> VisionTransformer:
    """The model without what torch.compile or DDP wrapped around it."""
    inner = unwrap_model(dense)
    if not isinstance(inner, VisionTransformer):
        raise ValueError(
            f"dense is a {type(inner).__name__}, and only timm's VisionTransformer can be"
            " converted; create one, such as timm.create_model('vit_small_patch16_224')"
        )
    check_blocks(inner)
    return inner


def dense_arguments(weights: Mapping[str, Tensor], module: Any) -> dict[str, Any]:
    """Arguments with which a routed model has the parts that these dense weights have.

    Args:
        weights: state dict of timm's `VisionTransformer`.
        module: the model itself, if there is one.
    """
    if "patch_embed.proj.weight" not in weights or "blocks.0.mlp.fc2.weight" not in weights:
        return {}  # of another kind: `from_dense` says so
    kernel = weights["patch_embed.proj.weight"]
    arguments = {
        "in_chans": kernel.shape[1],
        "patch_size": _plain(kernel.shape[2:]),
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
        "class_token": "cls_token" in weights,
        "reg_tokens": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "pos_embed": "learn" if "pos_embed" in weights else "none",
        "fc_norm": "fc_norm.weight" in weights,
        **part_arguments(weights),
    }
    if module is not None:
        return {**arguments, **_module_arguments(module)}
    if "pos_embed" in weights:
        grid = source_grid(weights)
        prefix = arguments["class_token"] + arguments["reg_tokens"]
        arguments["no_embed_class"] = weights["pos_embed"].shape[1] != grid[0] * grid[1] + prefix
        arguments["img_size"] = _plain(n * p for n, p in zip(grid, kernel.shape[2:], strict=True))
    pooled = "token" if arguments["class_token"] and not arguments["fc_norm"] else "avg"
    arguments["global_pool"] = "map" if "attn_pool.latent" in weights else pooled
    return arguments


def _module_arguments(module: Any) -> dict[str, Any]:
    """What the weights do not tell: image sizes, positions, pooling, activation, preprocessing."""
    arguments = {
        "img_size": _plain(module.patch_embed.img_size),
        "global_pool": module.global_pool,
        "no_embed_class": module.no_embed_class,
        "pool_include_prefix": module.pool_include_prefix,
        "act_layer": _activation(module.blocks[0].mlp.act),
    }
    if module.dynamic_img_size:
        arguments["dynamic_img_size"] = True
        arguments["dynamic_img_pad"] = module.patch_embed.dynamic_img_pad
    eps = module.blocks[0].norm1.eps
    if eps != 1e-6:  # timm's default and ours
        arguments["norm_eps"] = eps
    cfg = getattr(module, "pretrained_cfg", None) or {}
    kept = ("mean", "std", "interpolation", "crop_pct")
    arguments["pretrained_cfg_overlay"] = {key: cfg[key] for key in kept if key in cfg}
    return arguments


def _activation(activation: nn.Module) -> str:
    """timm's name of an activation."""
    for name in ACTIVATIONS:
        if type(activation) in (get_act_layer(name), {"gelu": nn.GELU}.get(name)):
            return name
    raise ValueError(
        f"the activation {type(activation).__name__} of the dense model cannot be converted;"
        f" only {', '.join(ACTIVATIONS)} can"
    )


def _plain(size: Any) -> int | tuple[int, int]:
    """One number for a square."""
    height, width = size
    return height if height == width else (height, width)
