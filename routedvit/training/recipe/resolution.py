"""Progressive resolution: early steps see smaller images, which is most of their cost.

The loader keeps giving crops of full size and they are shrunk on the device (bilinear, antialiased)
as they enter the objective, so data, their order and their augmentation do not change, and a resume
needs no state. What it saves is the model's time, not the decoding. The network must take any size
(`dynamic_img_size`): it interpolates its positions inside its forward, since under ZeRO a parameter
cannot be made anew.

Training at a lower resolution than testing: FixRes, 1906.06423; progressive: 2104.00298.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from routedvit.training.config.run import ConfigError


class ResolutionDial:
    """Shrinks the images that enter `objective` (as its first argument) by step.

    Args:
        objective: called as objective(image [B, C, H, W], ...); its `model` is the network.
        stages: (end, size): images are size x size pixels before step `end`, in rising order of
            `end`; full size after the last.
        full_size: (H, W) of the loader's images.

    Raises:
        ConfigError: a size that the model cannot take, or stages out of order.
    """

    def __init__(
        self,
        objective: nn.Module,
        stages: Sequence[tuple[int, int]],
        full_size: tuple[int, int],
    ) -> None:
        check_stages(objective.model, stages, full_size)  # type: ignore[arg-type]
        self.stages = tuple(stages)
        self.full_size = full_size
        self.size = full_size
        self._latest = full_size
        objective.register_forward_pre_hook(self._shrink)

    def turn(self, step: int) -> None:
        size = next((size for end, size in self.stages if step < end), None)
        self.size = self._latest = self.full_size if size is None else (size, size)

    def rest(self) -> None:
        self.size = self.full_size

    def scalars(self) -> dict[str, float]:
        return {"train/image_size": float(self._latest[0])}

    def setting(self) -> str:
        return f"{self._latest[0]} px"

    def _shrink(self, objective: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        image, *others = inputs
        if self.size == self.full_size:
            return None
        image = F.interpolate(image, self.size, mode="bilinear", antialias=True)
        return (image, *others)


def check_resampling(model: nn.Module, device: torch.device) -> None:
    """Refuse what has no deterministic backward pass on a GPU.

    Raises:
        ConfigError: the model resamples learned positions (timm: antialiased bicubic).
    """
    if device.type == "cuda" and getattr(model, "pos_embed", None) is not None:
        raise ConfigError(
            "resolution.stages with precision.deterministic: the gradient of resampled learned "
            "positions is not deterministic on a GPU; set model.kwargs.pos_embed = 'sincos', or "
            "precision.deterministic = false"
        )


def check_stages(
    model: nn.Module, stages: Sequence[tuple[int, int]], full_size: tuple[int, int]
) -> None:
    """Refuse what the model or the images cannot do.

    Raises:
        ConfigError: says which and how to mend it.
    """
    height, width = full_size
    if height != width:
        raise ConfigError(f"resolution.stages needs square images, and they are {height}x{width}")
    if not getattr(model, "dynamic_img_size", False):
        raise ConfigError(
            "resolution.stages needs a model that takes any image size; "
            "set model.kwargs.dynamic_img_size = true"
        )
    patch = max(model.patch_embed.patch_size)  # type: ignore[union-attr, arg-type]
    ends = [end for end, _ in stages]
    if sorted(set(ends)) != ends:
        raise ConfigError("resolution.stages: each `until` must be later than the one before")
    for _, size in stages:
        if size % patch or size > height:
            raise ConfigError(
                f"resolution.stages: size = {size} must be a multiple of the patch size {patch} "
                f"and at most the image size {height}"
            )
