"""Whether a module's weights may be read in place of calling it, and what it gives written to.

Where one operator does the work of two modules, the module that holds the weights is not called.
That is wrong once somebody has put another in its place (adapters, quantisation), changed its class
(FSDP2, parametrisations), given it a weight that is more than numbers (torchao, DTensor) or hooked
it to see its calls.
"""

from torch import nn

__all__ = ["is_plain", "is_watched"]


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether it is an instance of one of these very classes, with plain weights, that nobody
    watches.

    ZeRO-3 hooks every module and gathers weights wherever they are read: its hooks do not count.
    """
    if type(module) not in classes:
        return False
    # a weight of tensors knows how its layer uses it, but not how to be sliced
    # (PyTorch's `is_traceable_wrapper_subclass` is False of everything that Dynamo traces)
    if any(hasattr(type(w), "__tensor_flatten__") for w in module.parameters(recurse=False)):
        return False
    if not (_has_hooks(module) or module._forward_pre_hooks):
        return True
    return any(hasattr(weight, "ds_id") for weight in module.parameters(recurse=False))


def is_watched(module: nn.Module) -> bool:
    """Whether a hook, but for those of ZeRO-3, may hold what it or a part of it returns."""
    if not any(map(_has_hooks, module.modules())):
        return False
    return not any(hasattr(weight, "ds_id") for weight in module.parameters())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)
