"""What may have passed by the next start is not final to a scheduler; what must be mended is."""

from __future__ import annotations

import pickle

import pytest

from data import workers
from data.errors import BadShard, DataError, LoaderFailed, Unreachable, counted, legible
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
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  ...\n"
        "RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_0>: No space\n",
    ],
)
def test_the_death_of_a_loader_process_may_pass(text: str) -> None:
    with pytest.raises(LoaderFailed, match="then start again"):
        workers._raise_in_words(RuntimeError(text))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("größe/ทดสอบ 1", "größe/ทดสอบ 1"),
        ("می\u200cروم", "می\u200cروم"),
        ("👩\u200d🔬 1.23\u202fPM", "👩\u200d🔬 1.23\u202fPM"),
        ("co\xadop", r"co\xadop"),
        ("\u202egpj.tac\ue000", r"\u202egpj.tac\ue000"),
        ("\U0001f3f4\U000e0067", "🏴" + r"\U000e0067"),
    ],
)
def test_a_message_shows_what_is_in_a_name(name: str, shown: str) -> None:
    """Letters of any script as they are; what nobody sees, or what turns the line, escaped."""
    assert legible(name) == shown


def test_one_is_not_told_in_the_plural():
    assert [counted(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
