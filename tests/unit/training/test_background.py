"""A call in a thread: its result, its error, and that nothing of it stays behind."""

from __future__ import annotations

import gc
import threading
import traceback
import weakref

import pytest

from routedvit.training.background import Background, is_any_running


def test_its_result_is_waited_for():
    go = threading.Event()
    call = Background(lambda: go.wait(20), "save")
    assert call.running
    assert is_any_running()
    call.wait(0.01)
    assert call.running
    go.set()
    assert call.result() is True
    assert not call.running
    assert not is_any_running()


def test_its_error_is_raised_where_the_result_is_asked_for_and_says_where_it_was():
    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left") as caught:
        Background(fail, "save").result()
    assert "in fail" in "".join(traceback.format_exception(caught.value))


class Large:
    """Stands for a copy of all weights."""


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_it_refers_to_outlives_it(fails):
    gc.disable()  # as while a run trains
    try:
        large = Large()

        def act(held: Large = large) -> None:
            here = held  # the frame of an error holds it too
            if fails:
                try:
                    raise ValueError(repr(here))
                except ValueError as error:
                    raise OSError("no space left") from error

        call, there = Background(act, "save"), weakref.ref(large)
        del act, large
        call.wait(20)
        assert there() is None
        assert call.running is False
    finally:
        gc.enable()
