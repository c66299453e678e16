"""Running a model to look at it, leaving no trace: eval mode, no gradients, its own dtype.

And that every sample was counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from routedvit.training.config_base import ConfigError


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


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place; as they are where there is one. Collective."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def check_counts(name: str, seen: float, unusable: float, announced: int) -> None:
    """Every held-out sample was evaluated or could not be read, and some were evaluated.

    Raises:
        RuntimeError: the batches of all ranks hold more or fewer samples than the set.
        ConfigError: none of the images can be read.
    """
    if seen + unusable != announced:
        raise RuntimeError(
            f"{name}: {seen:.0f} samples were evaluated and {unusable:.0f} are unusable, the set "
            f"has {announced}. The shards differ from their manifest, or ranks read different "
            "lists."
        )
    if not seen:
        raise ConfigError(
            f"data.val: none of the {announced} held-out images can be read; "
            "`python -m data.check SHARDS` says why"
        )
