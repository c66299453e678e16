"""`data.check` finds damage, says where, and vouches only for what is whole."""

from __future__ import annotations

import errno
import json
import os
import stat

import pytest

from data import check, examination, reader
from data.index_file import content_for
from data.manifest import read_manifest, write_manifest
from data.shards import resolve
from tests.unit.data.making import pair, png, write_tar
from tests.unit.data.test_loaders import train_loader


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


def test_a_manifest_for_other_shards_of_the_folder_too_is_not_replaced(good, capsys):
    (first, *_) = sorted(good.glob("*.tar"))
    before = (good / "manifest.json").read_text()
    assert check.main(["--write-manifest", str(first)]) == 2
    assert "is for other shards too (" in capsys.readouterr().err
    assert (good / "manifest.json").read_text() == before
    assert check.main(["--write-manifest", f"{good}/*.tar"]) == 0


@pytest.mark.parametrize("options", [[], ["--write-manifest"]])
def test_a_shard_that_two_patterns_name_is_read_once(good, capsys, options):
    capsys.readouterr()
    assert check.main([*options, str(good), f"{good}/*.tar"]) == 0
    assert "6 samples in 2 shards" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "number"), [("same", 1), ("same", 2), ("other", 0)])
def test_keys_that_folders_share_are_a_hint_and_no_finding(tmp_path, capsys, name, number):
    """Of train/cat/1.jpg and val/cat/1.jpg nobody knows whether they are one image."""
    for folder, key in (("train", "same"), ("val", name)):
        (tmp_path / folder).mkdir()
        members = pair(key, 0, 0) + pair(f"{key}2" if number == 2 else f"{folder}2", 1, 0)
        write_tar(tmp_path / folder / "a.tar", members)
    patterns = [f"{tmp_path}/train/*.tar", f"{tmp_path}/val/*.tar"]
    assert check.main(["--write-manifest", *patterns]) == 0
    said = capsys.readouterr().out
    both = f"{tmp_path}/train and {tmp_path}/val"
    hint = f"NOTE      keys that are in more than one folder: {number}, such as same"
    assert ((hint in said), (both in said)) == (number > 0, number > 0)


def test_a_file_system_that_cannot_flush_folders_serves(good, monkeypatch):
    flush = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert check.main(["--write-manifest", f"{good}/*.tar"]) == 0


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


def test_a_finding_hides_nothing_of_a_name(tmp_path, capsys):
    good = pair("good", 0, 0)
    write_tar(tmp_path / "a.tar", [*good, ("\u202ea\xadb.png", b""), ("\u202ea\xadb.cls", b"0")])
    assert check.main(["--write-manifest", str(tmp_path / "*.tar")]) == 1
    assert r"a.tar: \u202ea\xadb: no JPEG" in capsys.readouterr().out


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
    assert examination.MAX_IMAGE_BYTES == reader.MAX_IMAGE_BYTES
    monkeypatch.setattr(examination, "MAX_IMAGE_BYTES", 20)
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


def foreign(path, count=200):
    """A tar as others write them: a sample without a label, one of another type, and junk."""
    members = [member for n in range(count) for member in pair(f"img.{n}", n % 7, n % 3)]
    junk = [("README.md", b"words"), ("x.png", png(0)), ("y.gif", b"GIF89a"), ("y.cls", b"1")]
    write_tar(path, members + junk)


def test_samples_that_lack_a_label_or_an_image_are_left_out_and_listed(tmp_path, capsys):
    foreign(tmp_path / "a.tar")
    for command in (["--write-manifest", str(tmp_path / "*.tar")], [str(tmp_path)]):
        assert check.main(command) == 0
        said = capsys.readouterr().out
        assert "skipped   2 skipped, the first x: no label (.cls)" in said
        assert "ignored   1 members" in said
    assert read_manifest(tmp_path / "manifest.json").samples == 200
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").open()]
    assert [(line["key"], line["shard"]) for line in lines] == [("x", "a.tar"), ("y", "a.tar")]


def test_samples_that_are_parts_of_others_by_name_are_told_of(tmp_path, capsys):
    """Also where the list is not there, as of a set adopted before they were looked for."""
    foreign(tmp_path / "a.tar", count=200)
    write_tar(tmp_path / "b.tar", pair("cat", 0, 0) + pair("cat.1", 1, 1))
    assert check.main(["--write-manifest", "--max-skipped", "0.02", f"{tmp_path}/*.tar"]) == 0
    assert read_manifest(tmp_path / "manifest.json").samples == 201
    keys = [json.loads(line)["key"] for line in (tmp_path / "skipped.jsonl").open()]
    assert keys == ["x", "y", "cat.1"]
    assert check.main(["--write-manifest", f"{tmp_path}/*.tar"]) == 2
    (tmp_path / "skipped.jsonl").unlink()
    capsys.readouterr()
    assert check.main([f"{tmp_path}/b.tar"]) == 0
    assert "1 skipped, the first cat.1: a part of sample 'cat'" in capsys.readouterr().out


def test_more_left_out_than_is_allowed_stops_the_command_and_vouches_for_nothing(tmp_path, capsys):
    foreign(tmp_path / "a.tar", count=20)
    assert check.main(["--write-manifest", str(tmp_path / "*.tar")]) == 2
    assert "more than the 0 of 22 that --max-skipped 0.01 allows" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "skipped.jsonl"}
    command = ["--write-manifest", str(tmp_path / "*.tar"), "--max-skipped", "0.1"]
    assert check.main(command) == 0


@pytest.mark.parametrize(
    ("option", "labels"), [(["--label-key", "json:label"], [1, 2]), (["--unlabelled"], [0, 0])]
)
def test_shards_without_cls_members_are_adopted_and_trained_on(
    tmp_path, make_config, capsys, option, labels
):
    members = []
    for number in (1, 2):
        text = json.dumps({"label": number, "caption": "a cat"}).encode()
        members += [
            (f"{number}.png", png(number)),
            (f"{number}.json", text),
            (f"{number}.txt", b""),
        ]
    write_tar(tmp_path / "a.tar", members)
    pattern = str(tmp_path / "*.tar")
    assert check.main(["--write-manifest", pattern]) == 2
    assert "--label-key and --unlabelled" in capsys.readouterr().err
    assert check.main(["--write-manifest", pattern, *option]) == 0
    assert check.main([str(tmp_path)]) == 0  # it knows where the labels were
    batch = next(train_loader(make_config(tmp_path), batch=2, micro=2).batches(0))
    assert sorted(batch["target"].tolist()) == labels
    (tmp_path / "a.tar.index").unlink()
    batch = next(train_loader(make_config(tmp_path), batch=2, micro=2).batches(0))
    assert sorted(batch["target"].tolist()) == labels


def test_whole_numbers_that_a_table_made_fractions_are_labels(tmp_path, capsys):
    members = []
    for number in range(100):
        text = json.dumps({"label": number % 3 + (0.5 if number == 99 else 0.0)}).encode()
        members += [(f"{number}.png", png(number)), (f"{number}.json", text)]
    write_tar(tmp_path / "a.tar", members)
    assert check.main(["--write-manifest", "--label-key", "json:label", f"{tmp_path}/*.tar"]) == 0
    assert read_manifest(tmp_path / "manifest.json").class_counts == [33, 33, 33]
    assert "1 skipped, the first 99: 'label' is b'0.5' and no class" in capsys.readouterr().out


def test_labels_are_those_of_the_key_also_where_only_tars_and_manifest_were_copied(tmp_path):
    members = []
    for number in (1, 2, 3):
        fine = json.dumps({"fine": number}).encode()
        members += [
            (f"{number}.png", png(number)),
            (f"{number}.cls", b"0"),
            (f"{number}.json", fine),
        ]
    write_tar(tmp_path / "a.tar", members)
    assert check.main(["--write-manifest", "--label-key", "json:fine", f"{tmp_path}/*.tar"]) == 0
    (tmp_path / "a.tar.index").unlink()
    shards = reader.ShardReader(resolve(str(tmp_path)))
    assert [shards.read(0, sample).label for sample in range(3)] == [1, 2, 3]


def test_a_set_is_adopted_by_reading_every_byte_once(tmp_path, monkeypatch):
    members = []
    for number in range(4):
        image = png(number, (300, 300), "RGB")
        members += [(f"{number}.png", image), (f"{number}.cls", b"1")]
    write_tar(tmp_path / "a.tar", members)
    read, original = [], os.pread

    def counting(descriptor, size, offset):
        found = original(descriptor, size, offset)
        read.append(len(found))
        return found

    monkeypatch.setattr(os, "pread", counting)
    assert check.main(["--write-manifest", str(tmp_path / "a.tar")]) == 0
    size = (tmp_path / "a.tar").stat().st_size
    assert size <= sum(read) < 1.1 * size  # headers and index come on top
    monkeypatch.undo()
    assert (tmp_path / "a.tar.index").read_bytes() == content_for(tmp_path / "a.tar")


def test_what_was_drafted_for_a_set_that_is_refused_is_taken_away(good):
    before = {path.name for path in good.iterdir()}
    os.truncate(good / "001.tar", 2048)
    assert check.main(["--write-manifest", str(good / "*.tar"), "--jobs", "2"]) == 2
    assert {path.name for path in good.iterdir()} == before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; mend it and start the same command again"),
        (errno.EROFS, "Read-only file system; link the shards (ln -s) into a folder that you may"),
    ],
)
def test_a_folder_that_cannot_be_written_is_said_in_a_line(
    good, capsys, monkeypatch, number, words
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(examination, "write_atomically", refuse)
    assert check.main(["--write-manifest", str(good / "*.tar")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert words in said
