"""The report on a set can be read: which classes are frequent or rare, how large images are."""

from __future__ import annotations

from data import check
from data.report import BAR, histogram
from tests.unit.data.making import pair, png, write_tar


def test_few_classes_are_all_listed_the_most_frequent_first():
    lines = histogram([1, 4, 0], ["ant", "bee", "cat"])
    assert lines[0] == "  classes   3, with 0 to 4 images each, 1 of them without any"
    assert [line.split() for line in lines[1:]] == [
        ["1", "bee", "4", "#" * BAR],
        ["0", "ant", "1", "#" * (BAR // 4)],
        ["2", "cat", "0"],
    ]


def test_of_many_classes_both_ends_are_shown():
    lines = histogram(list(range(1, 1001)), None)
    shown = [line.split()[0] for line in lines[1:]]
    assert shown == ["999", "998", "997", "996", "995", "...", "4", "3", "2", "1", "0"]
    assert lines[6].strip() == "... 990 more"


def test_a_class_name_cannot_steer_the_terminal_nor_fill_it():
    line = histogram([1, 1], ["\x1b[2J", "x" * 1000])
    assert "\x1b" not in "".join(line)
    assert max(map(len, line)) < 100


def test_classes_have_the_names_that_the_manifest_knows(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [*pair("x", 0, 0), *pair("y", 1, 1)])
    (tmp_path / "names").write_text("ant\nbee\n")
    command = [str(tmp_path / "a.tar"), "--label-names", str(tmp_path / "names")]
    assert check.main(["--write-manifest", *command]) == 0
    capsys.readouterr()
    assert check.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "0 ant  1" in said
    assert "1 bee  1" in said
    assert "shorter side" not in said  # all images are alike


def test_sizes_are_told_by_the_shorter_side(tmp_path, capsys):
    members = []
    for number in range(10):
        members += [(f"{number}.png", png(number, (10 + number, 40))), (f"{number}.cls", b"0")]
    write_tar(tmp_path / "a.tar", members)
    assert check.main(["--write-manifest", str(tmp_path / "a.tar")]) == 0
    said = capsys.readouterr().out
    assert "10 to 19 pixels wide, 40 to 40 high; 10 L" in said
    assert "shorter side: median 14, a tenth up to 10, a tenth from 18 on" in said


def test_images_that_are_ignored_are_counted_by_kind(tmp_path, capsys):
    members = [*pair("a", 0, 0), ("a.depth.png", b"x"), ("a.txt", b"a cat"), ("a.gif", b"x")]
    members += [*pair("b", 1, 0), ("b.depth.png", b"x")]
    write_tar(tmp_path / "a.tar", members)
    assert check.main(["--write-manifest", str(tmp_path / "a.tar")]) == 0
    said = capsys.readouterr().out
    assert "ignored   4 members that are neither a sample's image nor its label\n" in said
    assert "of them 3 images: 2 .depth.png, 1 .gif\n" in said


def test_a_shard_without_a_readable_image_does_not_shrink_the_others(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", pair("x", 0, 0))
    write_tar(tmp_path / "b.tar", [("y.png", b"no image"), ("y.cls", b"0")])
    assert check.main(["--write-manifest", f"{tmp_path}/*.tar"]) == 1
    assert "8 to 8 pixels wide, 8 to 8 high; 1 L" in capsys.readouterr().out
