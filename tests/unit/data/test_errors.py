"""What may have passed by the next start is not final to a scheduler; what must be mended is."""

from __future__ import annotations

import pickle

import pytest

from data import workers
from data.errors import BadShard, DataError, LoaderFailed, Unreachable
from routedvit.training.watch.console import CRASH_CODE, USER_ERROR_CODE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no such shard"), USER_ERROR_CODE),
        (BadShard("damaged"), USER_ERROR_CODE),
        (Unreachable("no network"), CRASH_CODE),
        (LoaderFailed("killed"), CRASH_CODE),
    ],
)
def test_exit_codes(error: DataError, code: int) -> None:
    arrived = pickle.loads(pickle.dumps(error))  # it comes from a loader process
    assert getattr(arrived, "exit_code", USER_ERROR_CODE) == code


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
        "DataLoader timed out after 540 seconds",
    ],
)
def test_the_death_of_a_loader_process_may_pass(text: str) -> None:
    with pytest.raises(LoaderFailed, match="then start again"):
        workers._raise_in_words(RuntimeError(text))
