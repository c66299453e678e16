"""Classification: the losses, mixed images, and the objective that joins them."""

from typing import Any

import timm.loss
import torch
from torch import nn

from routedvit.training.recipe.mixing import Mixing


class SupervisedObjective(nn.Module):
    """Classification against one label per image.

    The metric `top1` is in percent, on the augmented training images; of a mixed image the label
    is the one with the larger share.

    Args:
        model: images [B, C, H, W] -> logits [B, num_classes].
        loss: (float32 logits [B, num_classes], target) -> scalar; target is int64 [B], or float
            [B, num_classes] where `mixup` mixes.
        mixup: mixes images and labels in training, if not None; needs an even B.
    """

    best_metric = "val/top1"

    def __init__(self, model: nn.Module, loss: nn.Module, mixup: Mixing | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.mixup = mixup

    def forward(
        self, image: torch.Tensor, target: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean loss and {'top1': %} of image [B, C, H, W] and target int64 [B]."""
        if self.mixup is not None and self.training:
            image, target = self.mixup(image, target, position)
        logits = self.model(image).float()
        label = target if target.dim() == 1 else target.argmax(dim=-1)
        accuracy = 100 * (logits.detach().argmax(dim=-1) == label).float().mean()
        loss, metrics = self.measure(image, logits, target)
        return loss, {"top1": accuracy, **metrics}

    def measure(
        self, image: torch.Tensor, logits: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of float32 logits and what else is reported; image and target as mixed."""
        return self.loss(logits, target), {}


def build_mixup(mixup: float, cutmix: float, **options: Any) -> Mixing | None:
    """What mixes images (its arguments: `Mixing`), or None when both alphas are 0."""
    return Mixing(mixup, cutmix, **options) if mixup or cutmix else None


def build_loss(name: str, label_smoothing: float = 0.0, *, mixed: bool = False) -> nn.Module:
    """'softmax' or 'bce' (one sigmoid per class, summed over classes as in DeiT III, 2204.07118).

    With `mixed` the targets are dense and smoothed by Mixing already. timm's BinaryCrossEntropy
    smooths by itself; its sum over classes keeps the gradient's scale independent of their number.
    """
    if name == "bce":
        smoothing = 0.0 if mixed else label_smoothing
        return timm.loss.BinaryCrossEntropy(smoothing=smoothing, sum_classes=True)
    if mixed:
        return timm.loss.SoftTargetCrossEntropy()
    if label_smoothing > 0:
        return timm.loss.LabelSmoothingCrossEntropy(smoothing=label_smoothing)
    return nn.CrossEntropyLoss()
