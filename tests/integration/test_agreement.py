"""Machines that would not train the same run are told so before the first step, all alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.integration.launching import HERE, ROOT


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("agreement")
    subprocess.run(
        [sys.executable, HERE / "agreement_script.py", folder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        check=True,
        timeout=150,
    )
    found: dict[str, list[str]] = json.loads((folder / "report.json").read_text())
    left = [path.name for path in folder.rglob(".seen_by_all_ranks_*")]
    assert left == []
    return found


def test_ranks_that_agree_hear_nothing(report: dict[str, list[str]]) -> None:
    assert report["same"] == ["fine", "fine"]
    assert report["shared"] == ["fine", "fine"]
    assert report["all built"] == ["fine", "fine"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("config", ["rank 1 on ", "config.seed = 1", "rank 0 on ", "has 0"]),
        ("data", ['data = "3 samples"', 'has "4 samples"']),
        ("code", ["code.data/order = ", "same checkout"]),
        ("not shared", ["output_dir", "rank 1 on ", "does not see the files of rank 0 in"]),
    ],
)
def test_what_differs_is_named_on_every_rank(
    report: dict[str, list[str]], case: str, words: list[str]
) -> None:
    first, second = report[case]
    assert first == second
    for word in words:
        assert word in first


def test_what_fails_on_rank_0_alone_ends_all(report: dict[str, list[str]]) -> None:
    own, other = report["damaged"]
    assert own.startswith("JSONDecodeError: Expecting property name")
    assert other.startswith("RankFailed: rank 0 on ")
    assert ": JSONDecodeError: Expecting property name" in other
    assert report["refused"] == ["another run, exit code 2"] * 2


def test_what_one_rank_cannot_build_ends_all_before_they_wait_for_it(
    report: dict[str, list[str]],
) -> None:
    other, own = report["mistake"]
    assert own == "teacher: no such file, exit code 7"
    assert other.startswith("rank 1 on ")
    assert other.endswith(f": {own}")
    other, own = report["crash"]
    assert own == "OSError: disk fails\nmore"
    assert other.startswith("RankFailed: rank 1 on ")
    assert other.endswith(": OSError: disk fails")
    assert report["same mistake"] == ["teacher: no such file, exit code 7"] * 2
