"""Work that is shared among processes survives none of them dying unseen."""

from __future__ import annotations

import os
import signal

import pytest

from data.errors import DataError
from data.pool import each


def killed_at_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_that_the_system_kills_is_an_error_with_the_mend():
    with pytest.raises(DataError, match=r"one of the 2 processes was killed.* lower --jobs"):
        list(each(killed_at_two, range(9), jobs=2))
