"""Room in the memory of the host: the machine's, and below the limits of both kinds of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from routedvit.training import host_room
from routedvit.training.host_room import has_room_for

MIB = 1 << 20


@pytest.fixture(autouse=True)
def host(tmp_path, monkeypatch) -> Path:
    """A machine with 100 MiB free, and no limits yet."""
    monkeypatch.setattr(host_room, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_room, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(host_room, "MACHINE", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemTotal: 999999 kB\nMemAvailable: {100 << 10} kB\n")
    return tmp_path


def limit(host: Path, names: host_room._Names, path: str, limit: str, used: int, files: int = 0):
    """A cgroup with a limit in bytes."""
    folder = host / "groups" / names.root / path
    folder.mkdir(parents=True)
    (folder / names.limits[0]).write_text(f"{limit}\n")
    (folder / names.used).write_text(f"{used}\n")
    inactive, active = names.files
    stat = f"anon 5\n{inactive} {files // 2}\n{active} {files // 2}\n"
    (folder / "memory.stat").write_text(stat)


def test_a_tenth_of_what_the_machine_has_is_left_to_others():
    assert has_room_for(89 * MIB)
    assert not has_room_for(91 * MIB)


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (host_room.UNIFIED, "0::/job/step"),
        (host_room.FIRST, "4:memory:/job/step"),
        (host_room.FIRST, "4:cpu,memory:/job/step"),
    ],
)
def test_the_limit_of_a_group_that_the_process_is_in_counts(host, names, line):
    (host / "cgroup").write_text(f"3:cpuset:/elsewhere\n{line}\n")
    limit(host, names, "job", str(50 * MIB), used=40 * MIB, files=10 * MIB)
    limit(host, names, "job/step", "max", used=40 * MIB)
    assert has_room_for(17 * MIB)
    assert not has_room_for(19 * MIB)  # 20 MiB below the limit, the pages of files counted


def test_a_group_without_a_limit_and_one_of_others_say_nothing(host):
    (host / "cgroup").write_text("0::/job\n")
    limit(host, host_room.UNIFIED, "job", "max", used=90 * MIB)
    limit(host, host_room.UNIFIED, "other", str(MIB), used=0)
    assert has_room_for(89 * MIB)


def test_where_a_group_is_slowed_down_counts_as_its_limit(host):
    (host / "cgroup").write_text("0::/job\n")
    limit(host, host_room.UNIFIED, "job", "max", used=40 * MIB)
    (host / "groups" / "job" / "memory.high").write_text(f"{50 * MIB}\n")
    assert has_room_for(8 * MIB)
    assert not has_room_for(10 * MIB)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cgroup", b"nothing known\n"),
        ("cgroup", b"0::/\xff\xfe\n"),
        ("meminfo", b"MemAvailable: much\n"),
        ("meminfo", b"MemAvailable:\n"),
        ("groups/job/memory.stat", b"one word more\n"),
        ("groups/job/memory.stat", b"inactive_file none\n"),
    ],
)
def test_what_is_not_understood_says_nothing(host, name, text):
    (host / "cgroup").write_text("0::/job\n")
    limit(host, host_room.UNIFIED, "job", str(99 * MIB), used=0)
    (host / name).write_bytes(text)
    assert has_room_for(MIB)


def test_a_system_that_says_nothing_has_room(host):
    (host / "meminfo").unlink()
    assert has_room_for(1 << 60)


def test_this_machine_has_room_for_little(monkeypatch):
    monkeypatch.undo()
    assert has_room_for(1)
    assert not has_room_for(1 << 60)
