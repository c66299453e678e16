"""Weights of a dense timm vision transformer, put where they belong in a routed one.

The heavy path of a routed block has the shape of a dense block, so a dense block *is* the heavy
path: norms are shared, qkv is split into q and kv, and the light path begins with a zero output.
With every token heavy the routed model then computes what the dense one did (sparse upcycling,
arXiv 2212.05055; function-preserving as the rest starts from zero). Patch kernels are resampled as
in FlexiViT (2212.08013), position tables bicubically, both by timm.

Names are those of timm's `VisionTransformer`: AugReg, DeiT III, DINOv2 with registers, SigLIP, ...
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv, clean_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter_fn
from torch import Tensor

from routedvit.models.dense_parts import differing_arguments
from routedvit.models.fitting import some

__all__ = [
    "Transfer",
    "checkpoint_filter_fn",
    "converted_if_dense",
    "from_dense",
    "other_place",
    "source_grid",
    "unwrap",
]

_logger = logging.getLogger(__name__)

KINDS = ("copied", "split", "resampled", "initialised", "zero", "unused")
PREFIX = ("cls_token", "reg_token")  # in their order before the patches
# start of a name in a dense block -> starts of its names in a routed block, as far as it has them
BLOCK_NAMES = {
    "norm1.": ("attn.norm.", "attn.norm_heavy."),
    "ls1.": ("attn.ls.",),
    "attn.": ("attn.heavy.",),
    "norm2.": ("mlp.norm.", "mlp.norm_heavy."),
    "ls2.": ("mlp.ls.",),
    "mlp.": ("mlp.heavy.",),
}
# what a routed model may do without, and what it has that no dense one can give
OPTIONAL = ("head.", "cls_token", "reg_token", "pos_embed", "attn_pool.", "mask_token")
OWN = (".light.", "router.", ".null_", "head.", "cls_token", "reg_token")
LIGHT_OUTPUT = re.compile(r"\.light\.(proj|fc2)\.")
MEND = (  # where no arguments are known to differ
    "load the weights into their timm model and give that to routedvit.convert_dense, which chooses"
    " the arguments of the routed model to match"
)


@dataclass
class Transfer:
    """What became of every weight: (kind, dense name, routed name), printed with blocks merged."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, kind: str, source: str = "", target: str = "") -> None:
        self.rows.append((kind, source, target))

    def __str__(self) -> str:
        merged = Counter(
            (kind, *(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))
            for kind, *names in self.rows
        )
        lines = []
        for (kind, source, target), count in sorted(
            merged.items(), key=lambda item: KINDS.index(item[0][0])
        ):
            name = f"{source} -> {target}" if source and target not in ("", source) else source
            times = f"  x {count}" if count > 1 else ""
            lines.append(f"{kind:<12}{name or target}{times}")
        return "\n".join(lines)


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, under timm's names; LayerScale of DeiT III is renamed."""
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    weights = clean_state_dict(dict(state_dict))
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): w for name, w in weights.items()}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """What timm applies to a checkpoint before it loads it: a dense one is converted.

    Raises:
        ValueError: the checkpoint of another kind of model, or a dense one that does not fit.
    """
    weights = unwrap(state_dict)
    converted = converted_if_dense(weights, model)
    if converted is not weights:
        return dict(converted)
    if "blocks.0.attn.heavy.q.weight" not in weights:
        raise ValueError(
            f"the checkpoint is neither of a routed nor of a dense vision transformer of timm: it"
            f" holds {some(list(weights))}; pass the weights of the model that you create"
        )
    return timm_filter_fn(weights, model)


def converted_if_dense(weights: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """What `from_dense` makes of the weights of a dense model; others as they are."""
    if "blocks.0.attn.qkv.weight" not in weights:
        return weights
    converted, transfer = from_dense(weights, model)
    _logger.info("Converted dense weights\n%s", transfer)
    return converted


def from_dense(
    weights: Mapping[str, Tensor], model: Any, grid: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], Transfer]:
    """A state dict for a `RoutedVisionTransformer`, complete, and the report of where it came from.

    Args:
        weights: state dict of timm's `VisionTransformer`.
        model: the routed model; what dense weights cannot give keeps its values, except the outputs
            of the light path, which become zero.
        grid: (H, W) patches of the position table; square if None.

    Raises:
        ValueError: weights of another kind of model, of another width or depth, or of a model with
            parts that this one lacks, or lacking parts that it has.
    """
    _check_size(weights, model)
    own, transfer = model.state_dict(), Transfer()
    head_dim = model.blocks[0].attn.heavy.head_dim
    state: dict[str, Tensor] = {}
    misfits = []
    for name, tensor in _fit_stem(weights, model, grid).items():
        pieces = _pieces(name, tensor, own, head_dim)
        if pieces and all(own[n].shape == piece.shape for n, piece in pieces.items()):
            state.update(pieces)
            changed = "resampled" if tensor is not weights[name] else "copied"
            whole = all(piece is tensor for piece in pieces.values())
            for target in pieces:
                transfer.add(changed if whole else "split", name, target)
        elif name.startswith(OPTIONAL):
            transfer.add("unused", name)
        else:
            misfits.append(f"{name} {list(tensor.shape)}")
    if misfits:
        raise ValueError(f"this model has no place for {some(misfits)}; {_mend(weights, model)}")
    missing = [name for name in own if name not in state]
    if lacking := [name for name in missing if not any(mark in name for mark in OWN)]:
        raise ValueError(
            f"the dense weights lack what becomes {some(lacking)}; {_mend(weights, model)}"
        )
    for name in missing:
        zero = LIGHT_OUTPUT.search(name) is not None
        state[name] = torch.zeros_like(own[name]) if zero else own[name]
        transfer.add("zero" if zero else "initialised", target=name)
    return state, transfer


def _mend(weights: Mapping[str, Tensor], model: Any) -> str:
    """As JSON, since most models are created by a config."""
    if arguments := differing_arguments(weights, model):
        given = json.dumps(arguments)
        return f"create the routed model with the dense one's {given} (in a run: model.kwargs)"
    return MEND


def _check_size(weights: Mapping[str, Tensor], model: Any) -> None:
    kernel = weights.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4 or "blocks.0.attn.qkv.weight" not in weights:
        raise ValueError(
            f"these are no weights of timm's VisionTransformer: they hold {some(list(weights))}"
            f" but no patch_embed.proj.weight [D, C, h, w] or no blocks.0.attn.qkv.weight; {MEND}"
        )
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    have, want = (len(kernel), len(blocks)), (model.embed_dim, len(model.blocks))
    if have != want:
        raise ValueError(
            f"the dense weights are embed_dim={have[0]}, depth={have[1]}, the routed model is"
            f" embed_dim={want[0]}, depth={want[1]}: choose the model of the same size, or pass"
            f" embed_dim={have[0]}, depth={have[1]}"
        )
    inner_dim = len(model.blocks[0].attn.heavy.q.weight)
    if len(weights["blocks.0.attn.qkv.weight"]) != 3 * inner_dim:
        raise ValueError(
            f"heavy attention is num_heads * head_dim = {inner_dim} wide, the dense one is not:"
            " leave head_dim out"
        )


def _pieces(
    name: str, tensor: Tensor, own: Mapping[str, Tensor], head_dim: int
) -> dict[str, Tensor]:
    """What becomes of a dense weight, by the names of the routed model, as far as it has them."""
    match = re.match(r"(blocks\.\d+\.)(norm1\.|norm2\.|ls1\.|ls2\.|attn\.|mlp\.)(.+)", name)
    if match is None:
        moved = other_place(name)
        targets = [name, moved] if moved else [name]
        return {target: tensor for target in targets if target in own}
    block, part, rest = match.groups()
    names = [f"{block}{place}{rest}" for place in BLOCK_NAMES[part]]
    pieces = dict.fromkeys(names, tensor)
    if part + rest in ("attn.qkv.weight", "attn.qkv.bias"):
        q, k, v = tensor.chunk(3)
        kv = torch.stack([k.unflatten(0, (-1, head_dim)), v.unflatten(0, (-1, head_dim))], 1)
        kv = kv.flatten(0, 2)  # ordered [head, k or v, head_dim]
        pieces = {names[0].replace("qkv", "q"): q, names[0].replace("qkv", "kv"): kv}
    elif part + rest in ("mlp.fc1.weight", "mlp.fc1.bias") and names[0] not in own:
        gate, linear = tensor.chunk(2)  # timm's SwiGLUPacked
        pieces = {names[0].replace("fc1", "fc1_g"): gate, names[0].replace("fc1", "fc1_x"): linear}
    return {target: piece for target, piece in pieces.items() if target in own}


def other_place(name: str) -> str | None:
    """Of a weight of the last norm: its name where that stands on the other side of the pool."""
    moved = {"norm": "fc_norm", "fc_norm": "norm"}.get(name.split(".")[0])
    return f"{moved}.{name.split('.')[-1]}" if moved else None


def source_grid(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """(H, W) of the position table, which must be square, with or without rows for a prefix.

    Raises:
        ValueError: no square grid accounts for its rows.
    """
    rows = weights["pos_embed"].shape[1]
    prefix = sum(weights[name].shape[1] for name in PREFIX if name in weights)
    for num_patches in (rows - prefix, rows):
        side = math.isqrt(max(num_patches, 0))
        if side > 0 and side * side == num_patches:
            return side, side
    raise ValueError(
        f"pos_embed has {rows} rows, which is no square grid of patches: give"
        " routedvit.convert_dense the dense model instead of its weights"
    )


def _fit_stem(
    weights: Mapping[str, Tensor], model: Any, grid: tuple[int, int] | None
) -> dict[str, Tensor]:
    """The dense weights with the patch kernel and the position table of the routed model's size."""
    fitted = dict(weights)
    kernel = weights["patch_embed.proj.weight"]
    channels, *size = model.patch_embed.proj.weight.shape[1:]
    if kernel.shape[1] != channels:
        kernel = adapt_input_conv(channels, kernel)
    if list(kernel.shape[2:]) != size:
        kernel = resample_patch_embed(kernel, size)
    fitted["patch_embed.proj.weight"] = kernel
    if "pos_embed" not in weights or model.pos_embed is None:
        return fitted
    old = grid or source_grid(weights)
    new = model.patch_embed.grid_size
    num_rows = weights["pos_embed"].shape[1] - old[0] * old[1]
    rows, patches = weights["pos_embed"].tensor_split([num_rows], 1)
    patches = resample_abs_pos_embed(patches, list(new), list(old), num_prefix_tokens=0)
    num_wanted = model.pos_embed.shape[1] - patches.shape[1]
    same = num_wanted == num_rows and model.has_class_token == ("cls_token" in weights)
    if not same:
        # positions of prefix tokens become part of the tokens themselves
        for name in PREFIX:
            if name in weights and num_rows:
                own, rows = rows.tensor_split([weights[name].shape[1]], 1)
                fitted[name] = weights[name] + own
        rows = patches.new_zeros(1, num_wanted, patches.shape[2])
    if not same or tuple(old) != tuple(new):
        fitted["pos_embed"] = torch.cat([rows, patches], 1)
    return fitted
