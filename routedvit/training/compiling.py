"""torch.compile, one block at a time.

Blocks are equal, so one compiled block serves all of them, and what surrounds a block stays eager:
DeepSpeed's hooks above all. Under ZeRO-3 a block is made a leaf (`leaf_modules`): its weights are
gathered before its forward and no hook is left inside to break the graph. Checkpointing lies inside
a block and is compiled with it.

Blocks that differ in a constant (drop-path rates) are compiled each, and each once more for every
shape that the run schedules (capacities, image sizes) and for evaluation. torch gives up after 8
versions of one piece of code, here with an error; so the limit follows from the run.
Compiled code is kept in TORCHINDUCTOR_CACHE_DIR, by default a folder of the user in the machine's
/tmp: local to a node, as locks on network disks can hang, and found again by the next start.
"""

import os
import shutil
from collections.abc import Iterable

import torch
import torch._dynamo
from torch import nn
from torch.torch_version import TorchVersion as Version

from routedvit.training.config.run import ConfigError

RIGHT_UNDER_ZERO3 = Version("2.15")


def compile_blocks(model: nn.Module, device: torch.device, shapes: int = 1) -> None:
    """Compile the forward of every block of `model.blocks`, in place; state dicts do not change.

    Args:
        shapes: how many combinations of capacity and image size training goes through.

    Raises:
        ConfigError: the model has no blocks, or this machine no compiler.
    """
    blocks = blocks_of(model)
    _check_compiler(device)
    limit = 2 * len(blocks) * (shapes + 1)  # with and without gradients; one shape to evaluate
    torch._dynamo.config.recompile_limit = max(8, limit)
    torch._dynamo.config.accumulated_recompile_limit = 4 * max(64, limit)
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """`model.blocks`."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, Iterable):
        raise ConfigError(f"train.compile: {type(model).__name__} has no blocks; set it to false")
    return list(blocks)


def check_right_under_zero3() -> None:
    """DeepSpeed's linear of ZeRO-3 adds its bias in place inside an autograd function: compiled by
    torch 2.11, all three of its gradients are wrong, without a word.

    Raises:
        ConfigError: a torch whose compiler is not known to be right there.
    """
    if Version(torch.__version__) < RIGHT_UNDER_ZERO3:
        raise ConfigError(
            f"train.compile = true under ZeRO-3 needs torch {RIGHT_UNDER_ZERO3}, this is"
            f" {torch.__version__}: gradients were wrong with 2.11, the versions between are not"
            " tested; set train.compile = false, or deepspeed.zero_optimization.stage = 2"
        )


def leaf_modules(model: nn.Module) -> dict[str, list[str]]:
    """DeepSpeed's zero_optimization.leaf_module for whole blocks."""
    kinds = {type(block) for block in blocks_of(model)}
    return {"classes": sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)}


def _check_compiler(device: torch.device) -> None:
    """Inductor writes C++ for CPUs; Triton's launchers are C."""
    variable, names = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    wanted = [os.environ[variable]] if variable in os.environ else names
    if not any(shutil.which(name) for name in wanted):
        raise ConfigError(
            f"train.compile = true needs a compiler, and there is no {' or '.join(wanted)}; "
            f"install one, name it in {variable}, or set train.compile = false"
        )
