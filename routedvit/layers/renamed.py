"""Layers of ours whose parameters go by the names of the PyPI package `colt5-attention`.

State dicts are translated by renaming alone, in both directions, so
`state_dict(keep_vars=True)` gives our own parameters under the package's names. These are no paths
of attributes, by which some of PyTorch's tools look parameters up: `use_package_names`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from routedvit.ops.backend import backend, uses_triton

__all__ = ["Renamed", "public_names", "saved_names", "use_package_names"]


class Renamed(nn.Module):
    """A layer of ours, `self.layer`, whose parameters go by other names in state dicts."""

    names: ClassVar[dict[str, str]]  # ours -> those of colt5-attention
    package_names = True  # what state dicts are saved under; either is loaded

    def __init__(self, layer: nn.Module, use_triton: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.use_triton = use_triton
        self.register_load_state_dict_pre_hook(_load_their_names)
        self.register_state_dict_post_hook(_save_their_names)

    def insist_on_triton(self, x: Tensor) -> None:
        """Where colt5-attention would run its Triton kernel. On a CPU it runs PyTorch, as we do."""
        if self.use_triton and x.is_cuda and not uses_triton(x):
            raise ValueError(
                f"use_triton=True (router_use_triton of the model), but the backend is {backend()}:"
                " pass False, which computes the same, or call routedvit.ops.set_backend('triton'),"
                " which says what keeps Triton from running"
            )


def public_names(model: nn.Module) -> dict[str, str]:
    """Paths of parameters inside `model` -> what its state dict calls them, where they differ."""
    return {
        f"{path}.{ours}": f"{path}.{theirs}"
        for path, module in model.named_modules()
        if isinstance(module, Renamed)
        for ours, theirs in module.names.items()
    }


def use_package_names(model: nn.Module, use: bool) -> None:
    """Whether the state dicts of `model` go by the package's names, or by paths of attributes."""
    for module in model.modules():
        if isinstance(module, Renamed):
            module.package_names = use


def saved_names(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under either names -> under those that `model.state_dict()` has now.

    What is there twice keeps its name, so that whoever checks names finds one too many.
    """
    names = public_names(model)
    if not all(m.package_names for m in model.modules() if isinstance(m, Renamed)):
        names = {theirs: ours for ours, theirs in names.items()}
    names = {old: new for old, new in names.items() if new not in state_dict}
    return {names.get(name, name): value for name, value in state_dict.items()}


def _load_their_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    for ours, theirs in module.names.items():  # type: ignore[operator, union-attr]
        if prefix + theirs in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)


def _save_their_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    if not module.package_names:
        return
    for ours, theirs in module.names.items():  # type: ignore[operator, union-attr]
        if prefix + ours in state_dict:
            state_dict[prefix + theirs] = state_dict.pop(prefix + ours)
