"""What is minimised: modules that hold the network and return (loss, metrics).

The loss is computed inside the module that DeepSpeed wraps, because under ZeRO-3 weights exist only
inside that module's forward. An objective is any nn.Module with an attribute `model` and
forward(image, target) -> (scalar loss, {name: scalar}); the engine averages both over the world.
"""

import timm.loss
import torch
from torch import nn


class SupervisedObjective(nn.Module):
    """Classification against one label per image.

    The metric `top1` is in percent, on the augmented training images.

    Args:
        model: images [B, C, H, W] -> logits [B, num_classes].
        loss: (float32 logits [B, num_classes], int64 target [B]) -> scalar.
    """

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(
        self, image: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self.model(image).float()
        accuracy = 100 * (logits.detach().argmax(dim=-1) == target).float().mean()
        return self.loss(logits, target), {"top1": accuracy}


def build_loss(name: str, label_smoothing: float = 0.0) -> nn.Module:
    """'softmax' or 'bce' (one sigmoid per class, summed over classes as in DeiT III, 2204.07118).

    timm's BinaryCrossEntropy smooths by itself; its sum over classes keeps the gradient's scale
    independent of the number of classes.
    """
    if name == "bce":
        return timm.loss.BinaryCrossEntropy(smoothing=label_smoothing, sum_classes=True)
    if label_smoothing > 0:
        return timm.loss.LabelSmoothingCrossEntropy(smoothing=label_smoothing)
    return nn.CrossEntropyLoss()
