"""Training images that travel as bytes: normalised where they are used.

A micro-batch of 256 images of 224 px is 39 MB in bytes and 154 MB in fp32, which loader processes
would write, pinned memory hold and the bus carry. So loaders deliver bytes with two numbers per
channel where their last step is to normalise.
"""

import torch
from torch import Tensor

from routedvit.training.interfaces import Batch

__all__ = ["as_floats"]


def as_floats(batch: Batch) -> Tensor:
    """The images of a batch, normalised, on the device where they are.

    Args:
        batch: `image` float32 [b, C, H, W], returned as it is, or uint8 with `scale` and `shift`
            float32 [C, 1, 1].

    Returns:
        float32 [b, C, H, W]: image * scale - shift. Two roundings, not a fused one: the same
        numbers on every device.
    """
    images: Tensor = batch["image"]
    if images.dtype != torch.uint8:
        return images
    return images.float().mul_(batch["scale"]).sub_(batch["shift"])
