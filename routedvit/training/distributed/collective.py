"""What one rank does for all, what all do for one number, and how an error of one becomes all's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from routedvit.training.config.run import ConfigError
from routedvit.training.distributed.connection import place

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """`value` of every rank, in the order of ranks, on every rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's `value` on every rank. Collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def must_agree(what: str, value: object, mend: str) -> None:
    """Compare a (picklable) value over all ranks. Collective.

    Raises:
        ConfigError: on every rank, naming those that differ from rank 0.
    """
    values = gather(value)
    others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise ConfigError(f"rank {', '.join(others)} has other {what} than rank 0; {mend}")


class RankFailed(RuntimeError):
    """Another rank could not do its part; its own output has the traceback."""


class MistakeElsewhere(ConfigError):
    """A mistake that another rank has met; this one ends with the same exit code."""

    def __init__(self, text: str, exit_code: int | None) -> None:
        super().__init__(text)
        if exit_code is not None:
            self.exit_code = exit_code


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only and return its (picklable) result on every rank. Collective.

    Whatever it raises there ends all ranks: the others would wait for ever in the next collective.

    Raises:
        ConfigError: raised by `action`, on every rank, so that all of them end alike.
        RankFailed: `action` raised something else; rank 0 raises that itself.
    """
    result: Any = None
    fault: _Fault | None = None
    own: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = action()
        except Exception as error:
            own, fault = error, _Fault.of(error, (ConfigError,))
    result, fault = broadcast((result, fault))
    if own is not None:
        raise own
    if fault is not None:
        raise fault.elsewhere(name=not fault.is_mistake)
    return result


def together(action: Callable[[], T], mistakes: tuple[type[Exception], ...] = (ConfigError,)) -> T:
    """Run `action`, which does not communicate, on every rank; all go on or none. Collective.

    Args:
        action: its result stays on its rank.
        mistakes: what the user can mend, besides ConfigError.

    Raises:
        Exception: what `action` raised on this rank.
        ConfigError: it raised one of `mistakes` on others only; the text names the first of them.
        RankFailed: it raised something else on others only.
    """
    own: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as error:
        own = error
    faults = gather(_Fault.of(own, mistakes) if own is not None else None)
    if own is not None:
        raise own
    if fault := next(filter(None, faults), None):
        raise fault.elsewhere(name=True)
    return result


@dataclass(frozen=True)
class _Fault:
    """An error in a form that can travel."""

    where: str
    text: str
    is_mistake: bool
    exit_code: int | None  # what a mistake says of itself

    @classmethod
    def of(cls, error: Exception, mistakes: tuple[type[Exception], ...]) -> "_Fault":
        code = getattr(error, "exit_code", None)
        if isinstance(error, mistakes):
            return cls(place(dist.get_rank()), str(error), True, code)
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return cls(place(dist.get_rank()), text, False, code)

    def elsewhere(self, *, name: bool) -> Exception:
        """What the other ranks raise; `name`: with the rank that met it."""
        text = f"{self.where}: {self.text}" if name else self.text
        return MistakeElsewhere(text, self.exit_code) if self.is_mistake else RankFailed(text)


class WorldMean:
    """World mean of a small vector, copied to the host without stalling the device.

    The copy is enqueued before the optimiser step, which waits for the device by itself, so `get`
    after the step finds it done.
    """

    def __init__(self, values: torch.Tensor) -> None:
        dist.all_reduce(values)
        values /= dist.get_world_size()
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
