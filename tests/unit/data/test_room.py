"""The cache never takes more than its limit, and seldom looks at all of its files."""

from __future__ import annotations

import os

import pytest

from data.room import Room


@pytest.fixture
def looks(monkeypatch):
    """A list that grows with each look at all files."""
    seen, entries = [], Room._entries
    monkeypatch.setattr(Room, "_entries", lambda room: seen.append(room) or entries(room))
    return seen


def put(room, name, size):
    """As a fetch does it; returns the bytes that are there then."""
    part = room.folder / f"{name}.{size}.part"
    file = room.claimed(part, size)
    file.write(bytes(size))
    with file, room.lock():
        os.replace(part, room.folder / f"{name}.tar")
    os.utime(room.folder / f"{name}.tar", ns=(int(name), int(name)))
    return sum(path.stat().st_size for path in room.folder.glob("*.tar"))


def test_files_are_looked_at_once_for_a_twentieth_of_the_limit(tmp_path, looks):
    room = Room(tmp_path, 1000)
    for number in range(300):
        assert put(room, str(number), 10) <= 1000
    # the 1st finds the folder empty; from the 101st on, one look in 6 removes 6 files
    assert len(looks) <= 1 + 200 // 5
    names = {int(path.stem) for path in tmp_path.glob("*.tar")}
    assert len(names) >= 95
    assert min(names) == 300 - len(names)  # the newest are kept


def test_a_set_that_just_fits_is_never_evicted(tmp_path, looks):
    room = Room(tmp_path, 1000)
    for number in range(100):
        put(room, str(number), 10)
    assert len(list(tmp_path.glob("*.tar"))) == 100
    assert len(looks) == 1


@pytest.mark.parametrize("count", ["", "12", "x" * 21])
def test_a_count_that_was_cut_is_made_anew(tmp_path, count):
    room = Room(tmp_path, 100)
    put(room, "0", 60)
    (tmp_path / "lock-room").write_text(count)
    assert put(room, "1", 60) == 60


def test_files_that_somebody_else_put_there_are_counted(tmp_path):
    (tmp_path / "lock-room").write_text(f"{0:020d}\n")
    (tmp_path / "7.tar").write_bytes(bytes(60))
    assert put(Room(tmp_path, 100), "8", 60) == 60


def test_processes_with_other_limits_count_alike(tmp_path):
    large, small = Room(tmp_path, 1000), Room(tmp_path, 100)
    put(small, "0", 10)
    for number in range(1, 50):
        put(large, str(number), 10)
    assert put(small, "50", 10) <= 100
