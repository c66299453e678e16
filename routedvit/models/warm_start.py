"""Begin from weights that exist: of a dense vision transformer, or of a routed one.

A dense ViT of the same width and depth becomes the heavy path and the light path starts with a zero
output, see `dense_weights`; weights of a routed model (an export of this project, an MAE encoder)
are taken as they are. Patch kernels and position tables are resampled to the model's size. A
classifier of other classes is left out and the model keeps its own fresh one.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.models
from safetensors import SafetensorError
from torch import Tensor, nn

from routedvit.models.dense_weights import Transfer, checkpoint_filter_fn, from_dense, unwrap
from routedvit.models.routed_vit import RoutedVisionTransformer

__all__ = ["WarmStart", "warm_start"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
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
    weights, grid = _read(source)
    if "blocks.0.attn.qkv.weight" in weights:
        kind, (state, transfer) = "dense", from_dense(weights, model, grid)
    else:
        kind, (state, transfer) = "routed", _from_routed(weights, model)
    model.load_state_dict(state)
    fresh = [target for kind, _, target in transfer.rows if kind in ("initialised", "zero")]
    return WarmStart(source, kind, fresh, str(transfer))


def _read(source: str) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """State dict under timm's names, and the patch grid where it is known."""
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.is_file() or path.suffix in SUFFIXES:
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        try:
            return unwrap(timm.models.load_state_dict(str(path))), None
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} cannot be read: {reason}") from error
    if not source.startswith(FOREIGN) and not timm.is_model(source):
        raise ValueError(f"{source} is no file, no folder with model.safetensors, no timm model")
    try:
        other: Any = timm.create_model(source, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"timm cannot give the weights of {source}: {reason}") from error
    embed = getattr(other, "patch_embed", None)
    return unwrap(other.state_dict()), getattr(embed, "grid_size", None)


def _from_routed(
    weights: dict[str, Tensor], model: RoutedVisionTransformer
) -> tuple[dict[str, Tensor], Transfer]:
    """A complete state dict of `model`; only its classifier may be missing, or of other classes."""
    own, transfer = model.state_dict(), Transfer()
    state: dict[str, Tensor] = {}
    for name, tensor in checkpoint_filter_fn(weights, model).items():
        # the last norm stands before or after the pool
        moved = {"norm": "fc_norm", "fc_norm": "norm"}.get(name.split(".")[0])
        target = f"{moved}.{name.split('.')[-1]}" if moved and name not in own else name
        if name.startswith("head.") and (name not in own or own[name].shape != tensor.shape):
            transfer.add("unused", name)
        else:
            state[target] = tensor
            whole = name in weights and weights[name].shape == tensor.shape
            transfer.add("copied" if whole else "resampled", name, target)
    for name in own:
        if name not in state and name.startswith("head."):
            state[name] = own[name]
            transfer.add("initialised", target=name)
    return state, transfer
