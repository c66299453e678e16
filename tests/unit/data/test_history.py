"""Where the steps of a run begin, after a beginning elsewhere and returns past bad data."""

from __future__ import annotations

import json

import pytest

from data.errors import DataError
from data.history import History, Stretch, history_of


def test_a_run_that_goes_straight_on_multiplies(tmp_path):
    for run in (None, tmp_path):
        history = history_of(run, 8)
        assert [history.position(step) for step in (0, 3)] == [0, 24]
        assert [history.first_step_from(position) for position in (0, 1, 24, 25)] == [0, 1, 3, 4]


def test_a_return_ends_the_stretch_that_it_leaves():
    history = History([Stretch(5, 100), Stretch(7, 300)], 10)
    assert [history.position(step) for step in (5, 6, 7, 8)] == [100, 110, 300, 310]
    with pytest.raises(DataError, match="began at step 5, and step 4 was another run's"):
        history.position(4)
    found = [history.first_step_from(position) for position in (0, 101, 111, 150, 300, 301)]
    assert found == [5, 6, 7, 7, 7, 8]


def test_a_return_before_an_earlier_one_takes_its_place(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    jumps = [{"step": 6, "from": 48, "to": 80}, {"step": 4, "from": 32, "to": 120}]
    (tmp_path / "checkpoints" / "rollbacks.json").write_text(json.dumps(jumps))
    history = history_of(tmp_path, 8)
    assert [history.position(step) for step in (3, 4, 7)] == [24, 120, 144]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "origin.json").write_text("{")
    with pytest.raises(DataError, match=r"origin.json cannot be read"):
        history_of(tmp_path, 8)
