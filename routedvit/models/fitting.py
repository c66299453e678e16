"""Whether weights are those of a model, asked before loading: one line instead of a page."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["check_fit", "some"]


def check_fit(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Names and shapes of a state dict are those of the model.

    Raises:
        ValueError: they are not, with the first names that differ.
    """
    own = model.state_dict()
    shapes = [
        f"{name} {list(state_dict[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    misfits = {
        "they lack": [name for name in own if name not in state_dict],
        "they hold also": [name for name in state_dict if name not in own],
        "other shapes:": shapes,
    }
    if any(misfits.values()):
        found = "; ".join(f"{what} {some(names)}" for what, names in misfits.items() if names)
        raise ValueError(
            f"these are not the weights of this {type(model).__name__}: {found}. Create the model"
            " with the arguments of the one that was saved (timm keeps them in config.json)"
        )


def some(names: list[str]) -> str:
    """The first three of them, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
