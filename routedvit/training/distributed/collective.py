"""What one rank does for all, and what all do for one number."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from routedvit.training.config.run import ConfigError

T = TypeVar("T")


def must_agree(what: str, value: object, mend: str) -> None:
    """Compare a (picklable) value over all ranks. Collective.

    Raises:
        ConfigError: on every rank, naming those that differ from rank 0.
    """
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise ConfigError(f"rank {', '.join(others)} has other {what} than rank 0; {mend}")


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only and return its (picklable) result on every rank. Collective.

    Raises:
        ConfigError: raised by `action`, on every rank, so that all of them end alike.
    """
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except ConfigError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ConfigError(str(outcome[1]))
    return outcome[0]  # type: ignore[return-value]


class WorldMean:
    """World mean of a small vector, copied to the host without stalling the device.

    The copy is enqueued before the optimiser step, which waits for the device by itself, so `get`
    after the step finds it done. The last element is summed rather than averaged.
    """

    def __init__(self, values: torch.Tensor) -> None:
        dist.all_reduce(values)
        values[:-1] /= dist.get_world_size()
        self._host = values.to("cpu", non_blocking=True)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> list[float]:
        """The values; call it after the optimiser step."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host]
