"""Begin from weights that exist: of a dense vision transformer, or of a routed one.

A dense ViT of the same width and depth becomes the heavy path and the light path starts with a zero
output, see `dense_weights`; weights of a routed model (an export of this project, an MAE encoder)
are taken as they are. Patch kernels and position tables are resampled to the model's size. A
classifier of other classes is left out and the model keeps its own fresh one.
"""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import timm
import timm.models
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from routedvit.models.dense_check import check_blocks, check_heads
from routedvit.models.dense_weights import (
    Transfer,
    checkpoint_filter_fn,
    from_dense,
    other_place,
    source_grid,
    unwrap,
)
from routedvit.models.routed_vit import RoutedVisionTransformer

__all__ = ["WarmStart", "warm_start"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
SHAPED = ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")  # by the config
FOREIGN = ("hf-hub:", "local-dir:")  # sources that timm reads by itself


@dataclass(frozen=True)
class WarmStart:
    """What a model began from."""

    source: str
    kind: str  # 'dense' or 'routed': whose weights they are
    fresh: list[str]  # parameters that no weight reached: the model's own initial values, or zero
    report: str  # what became of each weight, blocks merged

    def __str__(self) -> str:
        share = f"; {len(self.fresh)} parameters start fresh" if self.fresh else ""
        return f"warm start from the {self.kind} weights of {self.source}{share}"


def warm_start(model: nn.Module, source: str) -> WarmStart:
    """Load weights into `model` in place.

    Args:
        model: routed vision transformer.
        source: a file of weights, a folder with `model.safetensors` (such as a run's `weights`),
            or a name that timm has weights for, such as 'vit_base_patch16_224.augreg_in21k'.

    Raises:
        ValueError: the source does not exist or cannot be read, or its weights are of another
            size or kind, in one line with the mend.
    """
    if not isinstance(model, RoutedVisionTransformer):
        raise ValueError(
            f"{type(model).__name__} is not a routed model; give its weights by"
            " model.kwargs.checkpoint_path or model.kwargs.pretrained"
        )
    weights, other = _read(source)
    grid = getattr(getattr(other, "patch_embed", None), "grid_size", None)
    if "blocks.0.attn.qkv.weight" in weights:
        if isinstance(other, VisionTransformer):
            check_blocks(other)
            if other.embed_dim == model.embed_dim:  # else that is what is said
                check_heads(other, model)
        kind, (state, transfer) = "dense", from_dense(weights, model, grid)
    else:
        if isinstance(other, RoutedVisionTransformer):
            _check_routed_heads(other, model)
        kind, (state, transfer) = "routed", _from_routed(weights, model, grid)
    model.load_state_dict(state)
    fresh = [target for kind, _, target in transfer.rows if kind in ("initialised", "zero")]
    return WarmStart(source, kind, fresh, str(transfer))


def _read(source: str) -> tuple[dict[str, Tensor], nn.Module | None]:
    """State dict under timm's names, and a model that it is of, maybe without values."""
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.is_file() or path.suffix in SUFFIXES:
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        try:
            weights = unwrap(timm.models.load_state_dict(str(path)))
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} cannot be read: {reason}") from error
        return weights, _described(path.with_name("config.json"), weights)
    if not source.startswith(FOREIGN) and not timm.is_model(source):
        raise ValueError(f"{source} is no file, no folder with model.safetensors, no timm model")
    try:
        other = timm.create_model(source, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"timm cannot give the weights of {source}: {reason}") from error
    return unwrap(other.state_dict()), other


def _described(config: Path, weights: dict[str, Tensor]) -> nn.Module | None:
    """The model that timm's config.json beside weights tells of, on `meta`; None if none does, or
    it tells of another.

    What weights do not say: the grid of their positions, heads, the order of operations.
    """
    try:
        known = json.loads(config.read_text(encoding="utf-8"))
        with torch.device("meta"):
            arguments = {"num_classes": known["num_classes"], **known.get("model_args", {})}
            model = timm.create_model(known["architecture"], **arguments)
    except Exception:  # whatever somebody's file makes timm raise: it describes nothing
        return None
    told = model.state_dict()
    same = (told[n].shape == weights[n].shape for n in SHAPED if n in told and n in weights)
    return model if all(same) else None


def _check_routed_heads(other: RoutedVisionTransformer, model: RoutedVisionTransformer) -> None:
    """Raises ValueError unless both have as many heads; shapes of weights tell the width alone."""
    theirs, ours = (m._routed_blocks()[-1].attn for m in (other, model))
    heads = {"num_heads": (theirs.heavy.num_heads, ours.heavy.num_heads)}
    if theirs.light is not None and ours.light is not None:
        heads["light_heads"] = (theirs.light.num_heads, ours.light.num_heads)
    for name, (have, want) in heads.items():
        if have != want:
            raise ValueError(
                f"the weights are of a model with {name}={have}, this one has {name}={want}:"
                f" pass {name}={have}, and the width of a head if it was given"
            )


def _from_routed(
    weights: dict[str, Tensor], model: RoutedVisionTransformer, grid: tuple[int, int] | None
) -> tuple[dict[str, Tensor], Transfer]:
    """A complete state dict of `model`; only its classifier may be missing, or of other classes."""
    own, transfer = model.state_dict(), Transfer()
    state: dict[str, Tensor] = {}
    table = weights.get("pos_embed")
    fitted = {name: tensor for name, tensor in weights.items() if name != "pos_embed"}
    fitted = checkpoint_filter_fn(fitted, model)
    if table is not None:
        fitted["pos_embed"] = _fit_positions(table, weights, model, grid)
    for name, tensor in fitted.items():
        target = name if name in own else other_place(name) or name
        if name.startswith("head.") and (name not in own or own[name].shape != tensor.shape):
            transfer.add("unused", name)
        else:
            state[target] = tensor
            whole = weights.get(name) is tensor  # another grid may have as many places
            transfer.add("copied" if whole else "resampled", name, target)
    for name in own:
        if name not in state and name.startswith("head."):
            state[name] = own[name]
            transfer.add("initialised", target=name)
    return state, transfer


def _fit_positions(
    table: Tensor,
    weights: dict[str, Tensor],
    model: RoutedVisionTransformer,
    grid: tuple[int, int] | None,
) -> Tensor:
    """The position table [1, P + N, D] of another routed model, at this one's grid.

    Where its grid is not known, one of as many rows is taken for this model's, others for square.

    Raises:
        ValueError: it has other rows for prefix tokens.
    """
    if model.pos_embed is None:
        return table  # the load says that there is no place for it
    new = model.patch_embed.grid_size
    wanted = model.pos_embed.shape[1]
    old = grid or (new if table.shape[1] == wanted else source_grid(weights))
    prefix = table.shape[1] - old[0] * old[1]
    if prefix != wanted - new[0] * new[1]:
        raise ValueError(
            f"pos_embed has {prefix} rows for prefix tokens, this model {wanted - new[0] * new[1]};"
            " set class_token, reg_tokens and no_embed_class as in the model of the weights"
        )
    if tuple(old) == tuple(new):
        return table
    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix)
