"""Which implementation an operator runs: the PyTorch reference or its Triton kernel.

`auto` takes the kernels on a GPU that Triton supports and PyTorch elsewhere; `torch` and `triton`
insist. The choice is made once in a process, at the first operator, from `set_backend` or else
from the environment variable ROUTEDVIT_BACKEND, and is logged with its reason. Callers of
`routedvit.ops` never branch on it.

Under TRITON_INTERPRET=1, set before Triton is first imported, `triton` runs on the CPU in Triton's
interpreter: thousands of times slower, for tests.
"""

import importlib
import importlib.util
import logging
import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = [
    "BACKENDS",
    "backend",
    "differentiates_itself",
    "plain_pytorch",
    "set_backend",
    "transformed",
    "uses_triton",
]

BACKENDS = ("auto", "torch", "triton")
VARIABLE = "ROUTEDVIT_BACKEND"
KERNELS = tuple(
    f"routedvit.ops.{name}_triton"
    for name in (
        "coordinate_descent",
        "gather_norm",
        "router_logits",
        "soft_topk",
        "window_attention",
    )
)
# Triton itself supports no older NVIDIA architecture
LOWEST_CAPABILITY = (8, 0)

logger = logging.getLogger(__name__)
_requested: str | None = None
_resolved: str | None = None


def set_backend(name: str | None) -> str:
    """Choose for the whole process, before anything is compiled; returns what it resolves to.

    Args:
        name: 'auto', 'torch' or 'triton'; None goes back to the environment variable.

    Raises:
        ValueError: unknown name, or 'triton' where it cannot run.
    """
    global _requested, _resolved
    _requested, _resolved = name, None
    return backend()


@torch.compiler.assume_constant_result
def backend() -> str:
    """'torch', or 'triton' if kernels run on some device of this process."""
    global _resolved
    if _resolved is None:
        name = _asked()
        _resolved, reason = _resolve(name)
        if _resolved == "triton":
            for module in KERNELS:  # registers its operators
                importlib.import_module(module)
        logger.info("backend %s (asked for: %s): %s", _resolved, name, reason)
    return _resolved


@torch.compiler.assume_constant_result
def plain_pytorch() -> bool:
    """Whether only PyTorch's own operators will do: a graph is made for another runtime (by
    torch.export or torch.jit.trace), or a transform watches that knows no others.

    Dynamo calls it instead of tracing it: that of torch 2.11 takes `is_exporting()` for True in all
    that it compiles, and no compiled model would ever see a kernel.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or transformed()


@torch.jit.ignore
def differentiates_itself() -> bool:
    """Whether an `autograd.Function` must step back for operators that differentiate themselves:
    compilers fuse those, and transforms (vmap, forward-mode AD) know how to treat them.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed()


def transformed() -> bool:
    """Whether this runs under torch.func (grad, vmap, jacrev, jvp) or forward-mode AD."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def uses_triton(x: Tensor) -> bool:
    """Whether kernels compute what depends on x.

    Always the reference: float64, which is there for checking gradients, and whatever needs plain
    PyTorch, see `plain_pytorch`.

    Raises:
        ValueError: 'triton' was asked for, by name, and x lies where it cannot run.
    """
    if plain_pytorch():
        return False
    if x.is_meta or x.dtype == torch.float64:
        return False
    # A rehearsal of training (`train.py --dry-run`), often for another machine than this one: it
    # must neither resolve the choice nor be refused.
    if isinstance(x, FakeTensor) and x.is_cpu:
        return False
    if backend() == "torch":
        return False
    if x.is_cuda or _interpreted():
        return True
    if _asked() == "triton":
        raise ValueError(
            f"backend='triton' cannot run on a tensor on {x.device}: move the model and its input"
            " to the GPU, or ask for 'auto'"
        )
    return False


def _asked() -> str:
    return _requested or os.environ.get(VARIABLE) or "auto"


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _resolve(name: str) -> tuple[str, str]:
    """The implementation and why."""
    if name not in BACKENDS:
        raise ValueError(
            f"backend={name!r} (set_backend or {VARIABLE}) is unknown;"
            f" choose one of {', '.join(BACKENDS)}"
        )
    if name == "torch":
        return "torch", "asked for"
    obstacle = _obstacle()
    if name == "auto":
        # nobody wants the interpreter without asking for it
        if obstacle is None and torch.cuda.is_available():
            return "triton", f"{torch.cuda.get_device_name()} runs the kernels"
        return "torch", obstacle or "no CUDA device"
    if obstacle is not None:
        raise ValueError(
            f"backend='triton' (set_backend or {VARIABLE}) cannot run here: {obstacle};"
            " ask for 'auto' or 'torch'"
        )
    return "triton", "interpreter" if _interpreted() else torch.cuda.get_device_name()


def _obstacle() -> str | None:
    """What keeps Triton from running, if anything."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < LOWEST_CAPABILITY:
        return f"compute capability {capability} is below {LOWEST_CAPABILITY}"
    return None
