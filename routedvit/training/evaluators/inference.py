"""Running a model to look at it, leaving no trace: eval mode, no gradients, its own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode of every submodule comes back at the end.

    Submodules are restored one by one, since a frozen teacher or a norm kept in eval mode must not
    wake up in train mode.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def as_input(images: Tensor, model: nn.Module) -> Tensor:
    """`images` on the device and in the dtype of the model's parameters.

    Right under ZeRO-3 too, where a parameter's local shape is empty but its type is not.
    """
    parameter = next(model.parameters())
    return images.to(parameter.device, parameter.dtype, non_blocking=True)
