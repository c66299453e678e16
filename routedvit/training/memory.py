"""Counts the bytes of live tensors, real or fake: every storage once, as it comes and goes.

Each operator that returns a tensor passes through a dispatch mode. A storage not seen before adds
its bytes, and a weak reference takes them off when it dies, so `peak` includes whatever an operator
allocates for a moment, in the backward pass and the optimiser too. Not seen is what a kernel
allocates and frees inside (workspaces of cuDNN and cuBLAS), nor rounding and fragmentation.

`torch.distributed._tools.MemTracker` does the like, with categories that follow the hooks of
modules and optimisers; DeepSpeed replaces the parameters and steps on shards of its own, so they
would be wrong here.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Bytes of the storages that operators made while the mode was on, and their maximum.

    live: bytes alive now.
    peak: largest `live` since the start or since `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # by address of the storage
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._aside: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.add(output)
        else:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self.add(leaf)
        return output

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor that existed before, or that this mode did not see made."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self._watched.get(address)
        if known is not None and known() is storage:
            if size != self._sizes[address]:  # resized in place
                self._grow(address, size - self._sizes[address])
            return
        self._watched[address] = weakref.ref(storage, lambda _: self._forget(address))
        self._sizes[address] = 0
        self._grow(address, size)

    def set_aside(self, tensors: Iterable[Tensor]) -> None:
        """Stop counting these: they lie elsewhere, such as in the memory of the host."""
        for tensor in tensors:
            address = tensor.untyped_storage()._cdata
            if address in self._sizes and address not in self._aside:
                self._aside.add(address)
                self.live -= self._sizes[address]

    def reset_peak(self) -> None:
        """Forget the maximum so far."""
        self.peak = self.live

    def _grow(self, address: int, size: int) -> None:
        self._sizes[address] += size
        if address not in self._aside:
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, address: int) -> None:
        size = self._sizes.pop(address)
        del self._watched[address]
        if address in self._aside:
            self._aside.discard(address)
        else:
            self.live -= size


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under these tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / 2**30


def readable(size: float) -> str:
    """Bytes in words: '3.42 GiB', '87.5 MiB'."""
    return f"{gib(size):.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
