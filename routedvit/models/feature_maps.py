"""Feature maps of single blocks: timm's `forward_intermediates`, for blocks that know the grid.

timm's own hands its blocks nothing but tokens, and reads the grid off the size of the image.
"""

from typing import Any

import torch
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from routedvit.models.arguments import check_choice

__all__ = ["FeatureMaps"]


class FeatureMaps(VisionTransformer):
    """A vision transformer whose blocks take (tokens, grid, rotary table), as `_embed` gives them.

    Its subclass is the model: this one has no `_embed`.
    """

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Images -> tokens [B, P + N, D], their grid, the rotary table [P + N, 2 * head_dim]."""
        raise NotImplementedError

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Final tokens and the feature maps of some blocks; arguments and results as in timm."""
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid, rope = self._embed(x)
        taken = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = block(x, grid, rope)
            if i in take:
                taken.append(self.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        maps = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else {**result, "image_features": self.norm(x)}
        intermediates = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    @torch.jit.ignore
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """Feature maps of the last n blocks, or of the blocks n, under DINO's name."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )
