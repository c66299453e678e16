"""`data.check` finds damage, says where, and vouches only for what is whole."""

from __future__ import annotations

import os

import pytest

from data import check, reader
from data.manifest import read_manifest, write_manifest
from data.shards import resolve
from tests.unit.data.making import pair, png, write_tar


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
        (
            lambda f: write_tar(f / "001.tar", pair("x", 1, 999_999_999)),
            "x: label 999999999; classes",
        ),
        (lambda f: (f / "001.tar").unlink() or (f / "001.tar").mkdir(), "001.tar: cannot be read"),
        (lambda f: claim(f, [3, 2, 1]), "2 images of class 0, the manifest says 3 (and 1 more"),
        (lambda f: claim(f, [2, 2, 2, 7]), "0 images of class 3, the manifest says 7"),
    ],
)
def test_what_is_wrong_is_named_and_the_exit_code_says_so(good, spoil, words, capsys):
    spoil(good)
    assert check.main([str(good)]) == 1
    assert words in capsys.readouterr().out


def claim(folder, counts):
    """Let the manifest say other numbers of images per class."""
    manifest = read_manifest(folder / "manifest.json")
    write_manifest(folder, manifest.model_copy(update={"class_counts": counts}))


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


def test_a_manifest_made_anew_keeps_what_no_shard_says(good):
    manifest = read_manifest(good / "manifest.json")
    told = {"label_names": ["ant", "bee", "cat", "dog"], "recipe": {"--source": "folder"}}
    counts = [*manifest.class_counts, 0]
    write_manifest(good, manifest.model_copy(update=told | {"class_counts": counts}))
    assert check.main(["--write-manifest", str(good / "*.tar")]) == 0
    again = read_manifest(good / "manifest.json")
    assert (again.recipe, again.label_names) == (told["recipe"], told["label_names"])
    assert again.class_counts == counts
    write_tar(good / "001.tar", pair("other", 1, 1))  # of this one nobody knows whence it came
    assert check.main(["--write-manifest", str(good / "*.tar")]) == 0
    again = read_manifest(good / "manifest.json")
    assert (again.recipe, again.label_names) == (None, None)


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


@pytest.mark.parametrize("depth", [[], ["--headers-only"]])
def test_a_cut_image_is_a_finding_at_any_depth(tmp_path, capsys, depth):
    write_tar(
        tmp_path / "a.tar", [*pair("good", 0, 0), ("cut.png", png(1)[:-40]), ("cut.cls", b"0")]
    )
    assert check.main(["--write-manifest", str(tmp_path / "a.tar"), *depth]) == 1
    assert "a.tar: cut: cannot be decoded" in capsys.readouterr().out


def test_an_identifier_as_label_does_not_become_as_many_classes(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", pair("good", 0, 1) + pair("bad", 1, 999_999_999))
    assert check.main(["--write-manifest", str(tmp_path / "a.tar")]) == 1
    assert "a.tar: bad: label 999999999; classes are numbered from 0" in capsys.readouterr().out
    assert read_manifest(tmp_path / "manifest.json").class_counts == [0, 1]


def test_images_that_training_would_refuse_are_a_note(good, capsys, monkeypatch):
    monkeypatch.setattr("data.statistics.MAX_TRAINED_PIXELS", 63)  # the images have 64
    assert check.main([str(good)]) == 0
    said = capsys.readouterr().out
    assert "NOTE      6 images of more than" in said
    assert "data.max_pixels" in said


def test_no_more_of_an_image_is_read_than_training_would_read(good, capsys, monkeypatch):
    assert check.MAX_IMAGE_BYTES == reader.MAX_IMAGE_BYTES
    monkeypatch.setattr(check, "MAX_IMAGE_BYTES", 20)
    assert check.main([str(good)]) == 1
    assert "encoded bytes; 20 are allowed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "names.txt: [Errno 2]"),
        ("größer".encode("latin-1"), "name a UTF-8 file with one class name per line"),
        (b"ant\nbee\n", "--label-names has 2 lines and"),
    ],
)
def test_names_that_do_not_serve_are_said_in_a_line(good, tmp_path, capsys, content, words):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    capsys.readouterr()
    assert check.main([str(good), "--label-names", str(path)]) == 2
    said = capsys.readouterr().err
    assert (words in said, said.count("\n")) == (True, 1)
