"""What `data.write` leaves out is told, listed, and limited."""

from __future__ import annotations

import json

import pytest

from data import write
from data.manifest import read_manifest
from tests.unit.data.making import png


@pytest.fixture
def flowers(tmp_path):
    """Ten images of one class."""
    folder = tmp_path / "flowers" / "rose"
    folder.mkdir(parents=True)
    for number in range(10):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


@pytest.fixture
def run(flowers, tmp_path, capsys):
    """run(*options) -> exit code, standard output, standard error."""

    def run(*options: str) -> tuple[int, str, str]:
        command = ["--source", "folder", "--path", str(flowers.parent), "--shard-size", "3"]
        code = write.main([*command, "--out", str(tmp_path / "out"), *options])
        return code, *capsys.readouterr()

    return run


def test_what_was_skipped_is_told_with_its_first_reason_and_the_list(flowers, tmp_path, run):
    (flowers / "4.png").write_bytes(b"<html>")
    path = tmp_path / "out/train/skipped.jsonl"
    code, said, _ = run("--max-skipped", "0.1")
    assert code == 0
    reason = "no JPEG, PNG or WebP image (UnidentifiedImageError)"
    told = f"1 skipped, the first rose/4: {reason} (all in {path})"
    assert told in said
    assert json.loads(path.read_text())["key"] == "rose/4"
    assert told in run("--max-skipped", "0.1")[1]  # of the finished set, too


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_more_than_the_limit_stops_the_command_with_the_mend(flowers, tmp_path, run, jobs):
    for number in (4, 5):
        (flowers / f"{number}.png").write_bytes(b"<html>")
    code, _, said = run("--max-skipped", "0.1", "--jobs", jobs)
    assert code == 2
    assert "2 skipped, the first rose/" in said
    assert "more than the 1 of 10 that --max-skipped 0.1 allows" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out/train/manifest.json").exists()
    assert run("--max-skipped", "0.2")[0] == 0


def test_by_default_one_in_a_hundred_may_be_skipped(flowers, tmp_path, run):
    (flowers / "bad.png").write_bytes(b"")
    assert run()[0] == 2
    for number in range(10, 99):
        (flowers / f"{number}.png").write_bytes(png(number))
    assert run()[0] == 0
    assert read_manifest(tmp_path / "out/train/manifest.json").samples == 99


def test_a_mended_image_is_taken_when_the_command_is_started_again(flowers, tmp_path, run):
    (flowers / "4.png").write_bytes(b"<html>")
    assert run()[0] == 2
    assert (tmp_path / "out/train/skipped.jsonl").exists()
    (flowers / "4.png").write_bytes(png(4))
    code, said, _ = run()
    assert (code, "skipped" in said) == (0, False)
    assert read_manifest(tmp_path / "out/train/manifest.json").samples == 10
    assert not (tmp_path / "out/train/skipped.jsonl").exists()  # it was of the earlier run


def test_files_that_are_no_images_by_name_are_counted_by_suffix(flowers, run):
    for name in ("a.heic", "b.HEIC", "c.tif", "d"):
        (flowers / name).write_bytes(b"")
    (flowers.parent / "README").write_bytes(b"")
    said = run()[1]
    assert "flowers: passed over 2 .heic, " in said
    for count in ("1 beside the class folders", "1 .tif", "1 without a suffix"):
        assert count in said


def test_where_every_file_has_another_suffix_the_error_names_them(tmp_path, capsys):
    folder = tmp_path / "photos" / "x"
    folder.mkdir(parents=True)
    (folder / "a.heic").write_bytes(b"")
    command = ["--source", "folder", "--path", str(folder.parent), "--out", str(tmp_path / "out")]
    assert write.main(command) == 2
    assert "(there: 1 .heic)" in capsys.readouterr().err
