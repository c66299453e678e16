"""Which dense vision transformers compute what a routed one can: asked of the model itself, since
names and shapes of weights do not tell the order of operations.
"""

from typing import Any

from timm.layers import Attention, GluMlp, Mlp, RmsNorm, SwiGLU
from timm.models.vision_transformer import Block
from torch import nn

__all__ = ["check_blocks", "check_heads"]


def check_blocks(dense: Any) -> None:
    """Refuse a `VisionTransformer` whose blocks are other than pre-norm attention and MLP, or
    whose patch embedding has a norm of another kind than theirs.

    Raises:
        ValueError: names the part that has no routed counterpart.
    """
    for number, block in enumerate(dense.blocks):
        parts = {"": block} if type(block) is not Block else _strange_parts(block)
        for name, part in parts.items():
            raise ValueError(
                f"blocks.{number}{name} of the dense model is a {type(part).__name__}, which a "
                "routed block has no counterpart of; only timm's Block with Attention, Mlp, SwiGLU "
                "or packed SwiGLU, and LayerNorm with bias or RmsNorm can be converted"
            )
    norm, eps = getattr(dense.patch_embed, "norm", nn.Identity()), dense.blocks[0].norm1.eps
    if not isinstance(norm, nn.Identity) and not (_is_plain(norm) and norm.eps == eps):
        raise ValueError(
            f"patch_embed.norm of the dense model is {norm}; only LayerNorm with bias or RmsNorm"
            f" can be converted, with the eps of the blocks, {eps}"
        )


def _is_plain(norm: nn.Module) -> bool:
    return isinstance(norm, RmsNorm) or (isinstance(norm, nn.LayerNorm) and norm.bias is not None)


def _strange_parts(block: Block) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {}
    if type(block.attn) is not Attention:
        parts[".attn"] = block.attn
    mlp = block.mlp
    gated = isinstance(mlp, GluMlp) and not mlp.gate_last  # as timm's SwiGLUPacked
    if type(mlp) not in (Mlp, SwiGLU) and not gated:
        parts[".mlp"] = mlp
    for name, norm in ((".norm1", block.norm1), (".norm2", block.norm2)):
        if not _is_plain(norm):
            parts[name] = norm
    return parts


def check_heads(dense: Any, routed: Any) -> None:
    """Raises ValueError unless heavy attention has as many heads as the dense model."""
    have = dense.blocks[0].attn.num_heads
    want = routed._routed_blocks()[0].attn.heavy.num_heads
    if have != want:
        raise ValueError(
            f"the dense model has num_heads={have}, the routed one num_heads={want}:"
            f" pass num_heads={have}, or choose the model of the same size"
        )
