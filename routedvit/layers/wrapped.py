"""Whether a module's weights may be read in place of calling it.

Where one operator does the work of two modules, the module that holds the weights is not called.
That is wrong once somebody has put another in its place (adapters, quantisation), changed its class
(FSDP2, parametrisations) or hooked it to see its calls.
"""

from torch import nn

__all__ = ["is_plain"]


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether it is an instance of one of these very classes that nobody watches.

    ZeRO-3 hooks every module and gathers weights wherever they are read: its hooks do not count.
    """
    if type(module) not in classes:
        return False
    if not (module._forward_hooks or module._forward_pre_hooks):
        return True
    return any(hasattr(weight, "ds_id") for weight in module.parameters(recurse=False))
