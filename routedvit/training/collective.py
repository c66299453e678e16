"""What one rank does for all: its result, or its mistake, reaches every rank."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from routedvit.training.config import ConfigError

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
