"""`data.check` finds damage, says where, and vouches only for what is whole."""

from __future__ import annotations

import os

import pytest

from data import check
from data.manifest import read_manifest
from data.shards import resolve
from tests.unit.data.making import pair, write_tar


@pytest.fixture
def good(make_set):
    folder = make_set([4, 2])
    assert check.main(["--write-manifest", str(folder / "*.tar")]) == 0
    return folder


def test_a_whole_set_passes(good, capsys):
    capsys.readouterr()
    assert check.main([str(good)]) == 0
    said = capsys.readouterr().out
    assert "6 samples in 2 shards" in said
    assert "all is well" in said
    assert "classes   3, with 2 to 2 images each" in said


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: os.truncate(f / "001.tar", 2048), "offset 2048: the end-of-archive blocks"),
        (lambda f: (f / "001.tar").unlink(), "001.tar: missing"),
        (lambda f: flip(f / "001.tar", 700), "sha256 is"),
        (lambda f: flip(f / "001.tar", 5), "checksum does not match"),
        (lambda f: write_tar(f / "001.tar", pair("only", 1, 1)), "samples is 1, the manifest says"),
        (lambda f: write_tar(f / "001.tar", pair("only", 1, 7)), "label 7, the manifest has 3"),
        (lambda f: write_tar(f / "001.tar", pair("train/0000", 1, 1)), "train/0000 is in 2 shards"),
        (lambda f: write_tar(f / "001.tar", [("x.png", b"x"), ("x.cls", b"0")]), "x: no JPEG"),
    ],
)
def test_what_is_wrong_is_named_and_the_exit_code_says_so(good, spoil, words, capsys):
    spoil(good)
    assert check.main([str(good)]) == 1
    assert words in capsys.readouterr().out


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_manifest_is_made_for_foreign_shards(tmp_path):
    for number in range(3):
        members = pair(f"a{number}", number, number) + pair(f"b{number}", number, 0)
        write_tar(tmp_path / f"x-{number}.tar", members)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    names = str(tmp_path / "names.txt")
    pattern = str(tmp_path / "x-{0..2}.tar")
    assert check.main(["--write-manifest", pattern, "--label-names", names, "--jobs", "2"]) == 0
    manifest = read_manifest(tmp_path / "manifest.json")
    assert (manifest.class_counts, manifest.label_names) == ([4, 1, 1], ["ant", "bee", "cat"])
    assert resolve(pattern).num_samples == 6


def test_no_manifest_is_made_for_damaged_shards(make_set, capsys):
    folder = make_set([4, 2])
    (folder / "manifest.json").unlink()
    os.truncate(folder / "001.tar", 2048)
    assert check.main(["--write-manifest", str(folder / "*.tar")]) == 2
    assert "001.tar: offset 2048" in capsys.readouterr().err
    assert not (folder / "manifest.json").exists()


def test_nothing_to_check_is_exit_code_two(tmp_path, capsys):
    assert check.main([str(tmp_path / "*.tar")]) == 2
    assert "no shard matches" in capsys.readouterr().err
