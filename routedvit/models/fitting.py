"""Whether weights are those of a model, asked before loading: one line instead of a page."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["MisfitError", "check_fit", "some"]


class MisfitError(ValueError, RuntimeError):
    """The weights of another model; a RuntimeError too, as torch raises."""


def check_fit(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Names and shapes of a state dict are those of the model.

    Where a part of it renames what it loads (torch's parametrisations do), torch is to judge.

    Raises:
        MisfitError: they are not, with the first names that differ.
    """
    own = model.state_dict()
    shapes = [
        f"{name} {list(state_dict[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state_dict and _shape(state_dict[name]) != _shape(tensor)
    ]
    misfits = {
        "they lack": [name for name in own if name not in state_dict],
        "they hold also": [name for name in state_dict if name not in own],
        "other shapes:": shapes,
    }
    if any(misfits.values()) and not any(map(_renames, model.modules())):
        found = "; ".join(f"{what} {some(names)}" for what, names in misfits.items() if names)
        raise MisfitError(
            f"these are not the weights of this {type(model).__name__}: {found}. Create the model"
            " with the arguments of the one that was saved (timm keeps them in config.json)"
        )


def _shape(value: Any) -> Any:
    """None for what a quantised layer keeps beside its tensors."""
    return getattr(value, "shape", None)


def _renames(module: nn.Module) -> bool:
    """Whether a hook that is not ours may change names before this module loads."""
    hooks: Any = module._load_state_dict_pre_hooks.values()
    ours = __name__.partition(".")[0]
    return any(not getattr(hook.hook, "__module__", "").startswith(ours) for hook in hooks)


def some(names: list[str]) -> str:
    """The first three of them, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
