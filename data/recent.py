"""What was asked for lately, so that it need not be made again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")

PATIENCE = 64  # calls that a value is kept for, at the least


class Recent(Generic[Value]):
    """Values by name, at least `size` of them and all that the last PATIENCE calls asked for.

    A call may ask for many. To drop what the next one wants again would be to make everything anew
    at every call, which takes longer than what it is for.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()  # by last use
        self._calls = 0

    def __len__(self) -> int:
        return len(self._values)

    def begin_call(self) -> None:
        """What is asked for from now on belongs together."""
        self._calls += 1

    def get(self, name: Hashable, make: Callable[[], Value]) -> Value:
        """The value of that name, made where it is not there."""
        value = self._values.pop(name)[0] if name in self._values else make()
        self._values[name] = value, self._calls
        while len(self._values) > self.size:
            oldest, (_, call) = next(iter(self._values.items()))
            if call > self._calls - PATIENCE:
                break
            del self._values[oldest]
        return value
