"""Masked autoencoding (MAE, 2111.06377): three quarters of the patches hidden, their pixels told.

The routed encoder computes the visible patches only (`encode_visible`), which is where MAE's three-
to fourfold saving comes from; its capacities count those. Any random subset will do: where windows
are no longer full, light attention masks what lies in other windows, and of V visible patches a
V x V mask is small.

Needs no labels. The classifier has nothing to learn here, so the model is made without one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routedvit.training.config.run import ConfigError
from routedvit.training.objectives.decoder import Decoder
from routedvit.training.objectives.masking import visible_patches

__all__ = ["MaskedObjective"]


class MaskedObjective(nn.Module):
    """Mean squared error on the pixels of the hidden patches.

    Args:
        model: routed encoder with `encode_visible(images, visible) -> [B, P + V, D]` and
            num_classes=0.
        mask_ratio: share of the patches that is hidden, rounded to whole patches.
        decoder_dim, decoder_depth, decoder_heads: see `Decoder`.
        norm_pixels: predict pixels normalised by mean and deviation of their own patch.
        seed: of the masks, which otherwise follow from the positions.

    Raises:
        ConfigError: a model without such an entry, or with parts that no loss would reach.
    """

    best_metric = "val/loss"
    model: Any  # what `_check_encoder` asks for

    def __init__(
        self,
        model: nn.Module,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pixels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_encoder(model)
        self.model = model
        self.mask_ratio = mask_ratio
        self.norm_pixels = norm_pixels
        self.seed = seed
        encoder: Any = model
        self.decoder = Decoder(
            encoder.embed_dim,
            encoder.patch_embed.proj.weight[0].numel(),
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
        )

    def no_weight_decay(self) -> set[str]:
        """Of the parameters beside the model."""
        return {"decoder.mask_token"}

    def forward(
        self, image: Tensor, target: Tensor, position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """image [B, C, H, W]; the target is not used."""
        grid = self.grid(image)
        visible = self.visible(position, grid)
        dtype = next(self.model.parameters()).dtype
        tokens = self.model.encode_visible(image.to(dtype), visible)
        prediction = self.decoder(tokens, visible, grid).float()
        error = (prediction - self.pixels(image)).square().mean(2)
        hidden = torch.ones_like(error).scatter(1, visible, 0)
        return (error * hidden).sum() / hidden.sum(), {}

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(H', W') patches of an image."""
        return self.model.patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))

    def visible(self, position: Tensor, grid: tuple[int, int]) -> Tensor:
        """int64 [B, V] ascending: the patches that samples at these positions show."""
        num_patches = grid[0] * grid[1]
        num_visible = round(num_patches * (1 - self.mask_ratio))
        return visible_patches(
            position,
            num_patches=num_patches,
            num_visible=min(max(num_visible, 1), num_patches - 1),
            seed=self.seed,
        )

    def pixels(self, image: Tensor) -> Tensor:
        """What is to be predicted: float32 [B, N, C * p * p]."""
        patches = self.patches(image)
        if not self.norm_pixels:
            return patches
        return (patches - patches.mean(2, keepdim=True)) / _deviation(patches)

    def patches(self, image: Tensor) -> Tensor:
        """float32 [B, N, C * p * p]."""
        size = self.model.patch_embed.patch_size
        return F.unfold(image.float(), size, stride=size).transpose(1, 2)

    def picture(self, image: Tensor, prediction: Tensor) -> Tensor:
        """Predictions [B, N, C * p * p] as images like `image`.

        With `norm_pixels` mean and deviation of a patch are not predicted: the true ones are used.
        """
        prediction = prediction.float()
        if self.norm_pixels:
            patches = self.patches(image)
            prediction = prediction * _deviation(patches) + patches.mean(2, keepdim=True)
        size = self.model.patch_embed.patch_size
        return F.fold(prediction.transpose(1, 2), image.shape[-2:], size, stride=size)


def _deviation(patches: Tensor) -> Tensor:
    return (patches.var(2, keepdim=True) + 1e-6).sqrt()


def _check_encoder(model: Any) -> None:
    if not hasattr(model, "encode_visible"):
        raise ConfigError(
            f"objective.name = 'mae' needs a model that can encode some of its patches; "
            f"{type(model).__name__} cannot, colt5_vit_* can"
        )
    if model.num_classes:
        raise ConfigError(
            f"model.kwargs.num_classes = {model.num_classes}: objective.name = 'mae' trains no "
            "classifier; delete it"
        )
    if model.attn_pool is not None:
        raise ConfigError(
            f"model.kwargs.global_pool = {model.global_pool!r} has weights that objective.name = "
            "'mae' does not train; use 'avg' or 'token'"
        )
