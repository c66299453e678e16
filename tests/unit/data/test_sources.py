"""Sources hold out what they are told to, or say why they cannot."""

from __future__ import annotations

import errno
import gzip
import os
import struct
import tracemalloc
from collections import Counter

import pytest

from data import write
from data.digits import idx_splits
from data.errors import DataError
from data.folders import folder_splits
from data.keys import Keys
from data.tar_index import read_index
from tests.unit.data.making import png


@pytest.fixture
def tree(tmp_path):
    """tree('train/a', 'val/a', count=4) -> a folder with these class folders."""

    def make(*folders: str, count: int = 4):
        for name in folders:
            (tmp_path / "tree" / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "tree" / name / f"{number}.png").write_bytes(png(number))
        return tmp_path / "tree"

    return make


def sizes(splits):
    return {name: len(split.references) for name, split in splits.items()}


def test_train_without_val_is_what_is_held_out_from(tree):
    root = tree("train/a", "train/b", "test/a")
    splits = folder_splits(root, 0.25)
    assert sizes(splits) == {"train": 6, "val": 2}
    assert splits["train"].ignored == Counter({"in test/": 4})


def test_a_class_without_a_folder_in_val_has_no_held_out_images(tree):
    val = folder_splits(tree("train/a", "train/b", "val/b"), 0)["val"]
    assert val.label_names == ["a", "b"]
    assert [(one.key, one.label) for one in val.references] == [(f"b/{n}", 1) for n in range(4)]


def test_links_to_folders_are_followed_once_and_hidden_folders_are_no_classes(tree, tmp_path):
    root = tree("a", ".ipynb_checkpoints")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.png").write_bytes(png(1))
    (root / "a" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "round").symlink_to(root / "a")
    split = folder_splits(root, 0)["train"]
    assert sorted(reference.key for reference in split.references) == [
        "a/0", "a/1", "a/2", "a/3", "a/more/x",
    ]  # fmt: skip
    assert split.label_names == ["a"]
    assert split.ignored == Counter({"hidden folders": 1})


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tree, monkeypatch):
    root, listing = tree("a/b"), os.scandir

    def stale(path):
        if str(path).endswith("b"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return listing(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        folder_splits(root, 0)


def test_a_class_whose_name_is_no_text_is_refused_before_anything_is_written(tree):
    root = tree("a")
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"'caf\\udce9' is no UTF-8; rename that class"):
        folder_splits(root, 0)


def test_holding_out_beside_a_val_folder_is_refused(tree):
    root = tree("train/a", "val/a")
    assert sizes(folder_splits(root, 0)) == {"train": 4, "val": 4}
    with pytest.raises(DataError, match="has a val folder of its own; leave the option out"):
        folder_splits(root, 0.25)


def test_a_share_that_holds_nothing_out_is_refused(tree):
    with pytest.raises(DataError, match="holds nothing out: the largest class has 4 images"):
        folder_splits(tree("a", "b"), 0.1)


def test_no_class_is_held_out_as_a_whole(tree):
    assert sizes(folder_splits(tree("a", "b", count=2), 0.9)) == {"train": 2, "val": 2}


@pytest.mark.parametrize("source", ["mnist", "idx", "dataset"])
def test_holding_out_of_a_source_with_a_val_split_is_refused(tmp_path, capsys, source):
    command = ["--source", source, "--path", str(tmp_path), "--held-out", "0.1"]
    assert write.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert f"--held-out is for folder and list; {source} has its own" in capsys.readouterr().err


def test_jpegs_under_other_suffixes_are_found(tree):
    root = tree("a", count=0)
    for name in ("x.jfif", "x.JPE", "x.mpo", "x.txt"):
        (root / "a" / name).write_bytes(b"")
    split = folder_splits(root, 0)["train"]
    assert len({reference.key for reference in split.references}) == 3
    assert split.ignored == Counter({".txt": 1})


def test_names_of_any_script_are_kept_and_can_be_read_back(tree, tmp_path):
    names = ["猫の写真", "Котёнок", "قطة", "größe"]
    root = tree(*names, count=2)
    for name in names:
        (root / name / f"{name}.png").write_bytes(png(9))
    out = tmp_path / "out"
    command = ["--source", "folder", "--path", str(root), "--out", str(out)]
    assert write.main(command) == 0
    index = read_index(out / "train" / "000000.tar", 12)
    wanted = {f"{name}/{file}" for name in names for file in ("0", "1", name)}
    assert {index.key(sample) for sample in range(12)} == wanted


def test_names_that_fall_together_are_numbered_and_stay_short():
    keys = Keys()
    found = [keys.of(f"x/{a}{b}") for a in "!?*+" for b in "!?*+"] + [keys.of("x/___2")]
    assert found[:3] == ["x/__", "x/___2", "x/___3"]
    assert len(set(found)) == len(found)
    many = [keys.of(str(number % 10 * "!")) for number in range(100_000)]
    assert len(set(many)) == len(many)
    assert max(map(len, many)) < 20


def test_keys_too_long_for_a_tar_end_in_a_hash():
    keys = Keys()
    one, other = (keys.of("猫" * 2000 + end) for end in ("甲", "乙"))
    assert one != other
    assert max(len(key.encode()) for key in (one, other)) < 1100
    assert keys.of("x" * 1000) == "x" * 1000


def test_a_sample_that_is_listed_takes_little_memory(tree):
    root = tree(*(f"class {number:03}" for number in range(20)), count=50)
    folder_splits(root, 0)
    tracemalloc.start()
    splits = folder_splits(root, 0)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sizes(splits) == {"train": 1000}
    assert size / 1000 < 350  # bytes, and ImageNet-21k has 14 million; a Path alone takes as much


IMAGES = struct.pack(">4B3I", 0, 0, 8, 3, 2, 4, 4) + bytes(32)
LABELS = struct.pack(">4BI", 0, 0, 8, 1, 2) + bytes(2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train-images-idx3-ubyte", IMAGES[:-1], "or it is cut"),
        ("train-images-idx3-ubyte", IMAGES[:9], "or it is cut"),
        ("train-images-idx3-ubyte", b"", "or it is cut"),
        ("train-images-idx3-ubyte", IMAGES[:4] + b"\xff" * 12 + bytes(32), "or it is cut"),
        ("train-images-idx3-ubyte", LABELS, "no idx file of 3 dimensions"),
        ("train-images-idx3-ubyte.gz", gzip.compress(IMAGES, mtime=0)[:-9], "damaged or cut"),
        ("train-images-idx3-ubyte.gz", b"<html>", "damaged or cut"),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b\x08" + b"\xff" * 40, "damaged or cut"),
        ("train-labels-idx1-ubyte", LABELS[:7] + b"\x01" + bytes(1), "2 train images and 1 labels"),
    ],
)
def test_idx_files_that_are_damaged_are_named(tmp_path, name, content, words):
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(IMAGES)
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(LABELS)
    assert sizes(idx_splits(tmp_path)) == {"train": 2, "val": 2}
    (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        idx_splits(tmp_path)


def test_an_empty_idx_set_is_refused(tmp_path):
    for prefix in ("train", "t10k"):
        header = struct.pack(">4B3I", 0, 0, 8, 3, 0, 4, 4)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(header)
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 0))
    with pytest.raises(DataError, match="the train files hold no images"):
        idx_splits(tmp_path)
