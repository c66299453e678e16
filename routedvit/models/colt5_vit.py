"""timm entry points of the routed vision transformer: `timm.create_model('colt5_vit_b')` after
`import routedvit`.

Widths, depths and heads are timm's. With the default capacities (a quarter of the patches heavy as
queries and in the FFN, half of them as keys and values) a model spends about half the FLOPs of its
dense twin, at 1.16 to 1.19 times its parameters. No weights yet: the cfgs carry the tag
'untrained'. Weights of a dense ViT load too, as `pretrained` or `checkpoint_path`.
"""

from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from routedvit.models.arguments import check_image
from routedvit.models.dense_weights import checkpoint_filter_fn
from routedvit.models.routed_vit import RoutedVisionTransformer

__all__: list[str] = []  # register_model adds each entry point


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "colt5_vit_test.untrained": _cfg(input_size=(3, 160, 160)),
        "colt5_vit_ti.untrained": _cfg(),
        "colt5_vit_s.untrained": _cfg(),
        "colt5_vit_b.untrained": _cfg(),
        "colt5_vit_l.untrained": _cfg(),
        "colt5_vit_h.untrained": _cfg(),
        "colt5_vit_tiny_patch16_224.untrained": _cfg(),
        "colt5_vit_small_patch16_224.untrained": _cfg(),
        "colt5_vit_base_patch16_224.untrained": _cfg(),
        "colt5_vit_large_patch16_224.untrained": _cfg(),
        "colt5_vit_huge_patch14_224.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RoutedVisionTransformer:
    return build_model_with_cfg(
        RoutedVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


def _window(side: int, kwargs: dict[str, Any], **defaults: int) -> int:
    """A variant's own light window as far as the grid allows: who asks for none is refused none."""
    sizes: dict[str, Any] = defaults | {name: kwargs[name] for name in defaults if kwargs.get(name)}
    check_image(sizes["img_size"], sizes["patch_size"])
    image, patch = (to_2tuple(sizes[name]) for name in ("img_size", "patch_size"))
    return max(1, min(side, image[0] // patch[0], image[1] // patch[1]))


@register_model
def colt5_vit_test(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """For tests: 64 wide, 6 blocks, class token, register, qk-norm, windows that need padding."""
    args: dict[str, Any] = {
        "img_size": 160,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 4,
        "light_window": _window(4, kwargs, img_size=160, patch_size=16),
        "class_token": True,
        "reg_tokens": 1,
        "qk_norm": True,
        "init_values": 1.0,
    }
    return _create("colt5_vit_test", pretrained, **{**args, **kwargs})


@register_model
def colt5_vit_ti(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """Routed ViT-Ti/16: 192 wide, 12 blocks, 3 heads."""
    args: dict[str, Any] = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("colt5_vit_ti", pretrained, **{**args, **kwargs})


@register_model
def colt5_vit_s(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """Routed ViT-S/16: 384 wide, 12 blocks, 6 heads."""
    args: dict[str, Any] = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("colt5_vit_s", pretrained, **{**args, **kwargs})


@register_model
def colt5_vit_b(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """Routed ViT-B/16: 768 wide, 12 blocks, 12 heads."""
    args: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("colt5_vit_b", pretrained, **{**args, **kwargs})


@register_model
def colt5_vit_l(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """Routed ViT-L/16: 1024 wide, 24 blocks, 16 heads."""
    args: dict[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("colt5_vit_l", pretrained, **{**args, **kwargs})


@register_model
def colt5_vit_h(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """Routed ViT-H/14: 1280 wide, 32 blocks, 16 heads, windows that divide its 16 x 16 patches."""
    args: dict[str, Any] = {
        "patch_size": 14,
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        "light_window": _window(8, kwargs, img_size=224, patch_size=14),
    }
    return _create("colt5_vit_h", pretrained, **{**args, **kwargs})


@register_model
def colt5_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """`colt5_vit_ti` under timm's long name."""
    return colt5_vit_ti(pretrained, **kwargs)


@register_model
def colt5_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """`colt5_vit_s` under timm's long name."""
    return colt5_vit_s(pretrained, **kwargs)


@register_model
def colt5_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """`colt5_vit_b` under timm's long name."""
    return colt5_vit_b(pretrained, **kwargs)


@register_model
def colt5_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """`colt5_vit_l` under timm's long name."""
    return colt5_vit_l(pretrained, **kwargs)


@register_model
def colt5_vit_huge_patch14_224(pretrained: bool = False, **kwargs: Any) -> RoutedVisionTransformer:
    """`colt5_vit_h` under timm's long name."""
    return colt5_vit_h(pretrained, **kwargs)
