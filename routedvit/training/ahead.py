"""Images on their way to the GPU while it computes on those before them.

A micro-batch of 256 images is 39 MB in bytes, 154 in fp32: a millisecond or a few, in which a GPU
that waits for them would compute nothing. Copies go through a stream of their own, from the pinned
memory that the loader delivers, one micro-batch ahead. (timm's PrefetchLoader does it for pairs of
images and labels; these batches say which samples they hold.)
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from routedvit.training.interfaces import Batch

__all__ = ["Ahead"]


class Ahead:
    """Sends batches to `device`, each while the one before it is worked on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams: Any = torch.get_device_module(device)
        self.stream = None if device.type == "cpu" else self.streams.Stream()

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches` with their tensors on the device; the next one is asked for and sent off before
        each is handed over, so one more than is handed over lies there.

        Batches that are there already stay as they are, and wait for nothing.
        """
        if self.stream is None:
            yield from batches
            return
        coming: tuple[Batch, bool] | None = None
        for batch in batches:
            # received before the next is sent off, or it would wait for that one too
            arrived = None if coming is None else self._receive(*coming)
            coming = self._send(batch)
            if arrived is not None:
                yield arrived
        if coming is not None:
            yield self._receive(*coming)

    def _is_here(self, batch: Batch) -> bool:
        tensors = (value for value in batch.values() if isinstance(value, Tensor))
        return all(tensor.device.type == self.device.type for tensor in tensors)

    def _send(self, batch: Batch) -> tuple[Batch, bool]:
        """Begin to copy; the batch on the device, and whether there was anything to copy."""
        if self._is_here(batch):
            return batch, False
        with self.streams.stream(self.stream):
            copies = {
                key: value.to(self.device, non_blocking=True)
                if isinstance(value, Tensor)
                else value
                for key, value in batch.items()
            }
        return copies, True

    def _receive(self, batch: Batch, copied: bool) -> Batch:
        """Let what is computed from now on wait for all copies that were begun so far."""
        if not copied:
            return batch
        current = self.streams.current_stream()
        current.wait_stream(self.stream)
        for value in batch.values():
            if isinstance(value, Tensor):
                # its memory must not go to a later copy before this stream is done with it
                value.record_stream(current)
        return batch
