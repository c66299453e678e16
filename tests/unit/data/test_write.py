"""Shards come out whole, reproducible and vouched for; a stopped writer goes on where it was."""

from __future__ import annotations

import errno
import gzip
import json
import struct
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import webdataset
from PIL import Image

from data import check, write
from data.encoding import Encoding
from data.keys import safe_key
from data.listings import dataset_split
from data.manifest import read_manifest, sha256_of
from data.shards import resolve
from data.sources import Split
from data.tar_index import read_index
from data.writer import write_split
from tests.unit.data.making import png


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    assert write.main(["--source", "mnist", "--out", str(out)]) == 0
    return out


@pytest.fixture
def photographs(tmp_path):
    """Two classes of 12 JPEGs and PNGs, a text file, and a file that is no image."""
    root = tmp_path / "photographs"
    generator = np.random.default_rng(0)
    for name in ("cat", "dog.v2"):
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 256, (60 + number, 80, 3), dtype=np.uint8)
            suffix = "jpg" if number % 2 else "png"
            Image.fromarray(pixels).save(root / name / f"img.{number}.{suffix}")
        (root / name / "notes.txt").write_text("not an image")
    (root / "cat" / "broken.jpg").write_bytes(b"<html>")
    return root


def from_folder(root: Path, out: Path) -> list[str]:
    return ["--source", "folder", "--path", str(root), "--out", str(out), "--max-skipped", "0.2"]


def test_a_url_is_no_place_to_write_to(tmp_path, monkeypatch, capsys):
    """Path would make a folder 's3:' of it."""
    monkeypatch.chdir(tmp_path)
    assert write.main(["--source", "mnist", "--out", "s3://bucket/photos"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "s3://bucket/photos is a URL; write to a disk, then copy" in said
    assert list(tmp_path.iterdir()) == []


def test_the_digits_are_stratified_and_match_their_manifest(digits):
    for name, shards, per_class in (("train", 16, 400), ("val", 4, 100)):
        manifest = read_manifest(digits / name / "manifest.json")
        assert manifest.class_counts == [per_class] * 10
        assert [entry.samples for entry in manifest.shards] == [250] * shards
        for entry in manifest.shards:
            path = digits / name / entry.name
            assert (path.stat().st_size, sha256_of(path)) == (entry.bytes, entry.sha256)
            labels = read_index(path, 250).labels
            assert len(set(labels[:40].tolist())) > 5  # shuffled, not sorted by class
    keys = {
        split: {
            key
            for path in map(Path, resolve(str(digits / split)).names)
            for key in read_index(path).keys.tolist()
        }
        for split in ("train", "val")
    }
    assert (len(keys["train"]), len(keys["val"])) == (4000, 1000)
    assert not keys["train"] & keys["val"]


def test_mean_and_std_are_those_of_the_pixels(digits):
    folder = digits / "val"
    images = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            images += [
                np.asarray(Image.open(tar.extractfile(member))) / 255
                for member in tar
                if member.name.endswith("png")
            ]
    manifest = read_manifest(folder / "manifest.json")
    assert manifest.mean == pytest.approx([np.mean(images)], abs=1e-5)
    assert manifest.std == pytest.approx([np.std(images)], abs=1e-5)
    assert (manifest.modes, manifest.width, manifest.height) == ({"L": 1000}, (28, 28), (28, 28))


def test_webdataset_reads_the_shards(digits):
    urls = resolve(str(digits / "val")).names
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 1000
    assert {int(sample["cls"]) for sample in samples} == set(range(10))
    assert samples[0]["__key__"] == read_index(Path(urls[0])).key(0)


def test_a_second_run_does_nothing_and_says_so(digits, capsys):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    assert write.main(["--source", "mnist", "--out", str(digits)]) == 0
    said = capsys.readouterr().out
    assert said.count("complete already") == said.count("\n") == 2
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before


def test_image_bytes_are_copied_unchanged_and_junk_is_named(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    command = from_folder(photographs, out)
    assert write.main([*command, "--held-out", "0.25", "--shard-size", "5"]) == 0
    assert "18 images of 2 classes in 4 shards" in capsys.readouterr().out
    manifest = read_manifest(out / "train" / "manifest.json")
    assert manifest.label_names == ["cat", "dog.v2"]
    assert sum(manifest.class_counts) == 18
    stored = set()
    for path in out.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid) == (0, 0)
                assert member.name.partition(".")[2] in ("png", "jpg", "cls")
                if not member.name.endswith("cls"):
                    stored.add(tar.extractfile(member).read())
    originals = {path.read_bytes() for path in photographs.rglob("img*")}
    assert stored == originals
    skipped = [path.read_text() for path in out.rglob("skipped.jsonl")]
    assert [json.loads(line)["key"] for line in skipped] == ["cat/broken"]


def test_writing_again_gives_the_same_bytes_with_any_number_of_jobs(photographs, tmp_path):
    hashes = []
    for jobs in ("1", "2"):
        out = tmp_path / f"out{jobs}"
        command = from_folder(photographs, out)
        assert write.main([*command, "--shard-size", "6", "--jobs", jobs]) == 0
        hashes.append([entry.sha256 for entry in resolve(str(out / "train")).entries])
    assert hashes[0] == hashes[1]


def test_a_stopped_writer_goes_on_and_leaves_finished_shards_alone(
    photographs, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    command = from_folder(photographs, out)
    command += ["--shard-size", "6"]
    import data.writer

    original, written = data.writer._publish, []

    def stopping(job, temporary, statistics):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(job.path.name)
        return original(job, temporary, statistics)

    monkeypatch.setattr(data.writer, "_publish", stopping)
    assert write.main(command) == 130
    assert not (out / "train" / "manifest.json").exists()
    monkeypatch.setattr(data.writer, "_publish", original)
    before = [(out / "train" / name).stat().st_mtime_ns for name in written]
    assert write.main(command) == 0
    assert [(out / "train" / name).stat().st_mtime_ns for name in written] == before
    assert check.main([str(out / "train")]) == 0
    assert sorted(path.name for path in (out / "train").iterdir()) == [
        *(f"{number:06d}.tar{end}" for number in range(5) for end in ("", ".index")),
        "manifest.json",
        "skipped.jsonl",
    ]


def test_a_stopped_writer_does_not_go_on_with_images_of_another_folder(
    photographs, tmp_path, monkeypatch
):
    """Though they have the same names and classes."""
    import data.writer

    other = tmp_path / "other"
    for path in photographs.rglob("*.*g"):
        (other / path.relative_to(photographs)).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(photographs)).write_bytes(png(7))
    command = [*from_folder(photographs, tmp_path / "out"), "--shard-size", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(data.writer, "write_manifest", lambda *_: _interrupt())
        assert write.main(command) == 130
    command[command.index("--path") + 1] = str(other)
    assert write.main(command) == 0
    with tarfile.open(tmp_path / "out" / "train" / "000000.tar") as tar:
        images = [tar.extractfile(member).read() for member in tar if "cls" not in member.name]
    assert {*images} == {png(7)}


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_resize_shrinks_the_shorter_side_and_keeps_small_images(photographs, tmp_path):
    out = tmp_path / "out"
    command = from_folder(photographs, out)
    assert write.main([*command, "--resize", "32"]) == 0
    manifest = read_manifest(out / "train" / "manifest.json")
    assert manifest.height == (32, 32)
    assert 32 < manifest.width[0] <= manifest.width[1] < 48


def test_idx_files_become_shards_with_the_same_pixels(tmp_path):
    images = {}
    for prefix, count in (("train", 20), ("t10k", 10)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 9, 7), dtype=np.uint8)
        labels = (np.arange(count) % 4).astype(np.uint8)
        header = struct.pack(">4B3i", 0, 0, 8, 3, count, 9, 7)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        packed = gzip.compress(struct.pack(">4Bi", 0, 0, 8, 1, count) + labels.tobytes())
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(packed)
        images[prefix] = {image.tobytes(): n % 4 for n, image in enumerate(pixels)}
    out = tmp_path / "out"
    assert write.main(["--source", "idx", "--path", str(tmp_path), "--out", str(out)]) == 0
    found = {}
    with tarfile.open(out / "val" / "000000.tar") as tar:
        members = tar.getmembers()
        for image, label in zip(members[::2], members[1::2], strict=True):
            pixels = np.asarray(Image.open(tar.extractfile(image)))
            found[pixels.tobytes()] = int(tar.extractfile(label).read())
    assert found == images["t10k"]


def test_keys_hold_no_dots_and_nothing_unsafe():
    assert safe_key("dog.v2/img 1.jpg") == "dog_v2/img_1_jpg"
    assert safe_key("größe") == safe_key("gro\u0308ße") == "größe"
    assert safe_key("猫/01\u202f\u200f\udcff.jpg") == "猫/01____jpg"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "folder"], "needs --path"),
        (["--source", "folder", "--path", "nowhere"], "nowhere is no folder"),
        (["--source", "idx", "--path", "nowhere"], "neither train-images-idx3-ubyte nor"),
    ],
)
def test_a_source_that_is_not_there_is_said_in_a_line(tmp_path, capsys, arguments, words):
    assert write.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("numeric", [False, True])
def test_a_csv_list_becomes_shards(photographs, tmp_path, numeric):
    rows = [(path, path.parent.name) for path in sorted(photographs.rglob("img*"))]
    lines = [f"{p.relative_to(tmp_path)},{2 if numeric else name},x" for p, name in rows]
    (tmp_path / "list.csv").write_text("\n".join(["file,species,note", *lines]))
    out = tmp_path / "out"
    command = ["--source", "list", "--path", str(tmp_path / "list.csv"), "--out", str(out)]
    assert write.main([*command, "--image-column", "file", "--label-column", "species"]) == 0
    manifest = read_manifest(out / "train" / "manifest.json")
    assert manifest.class_counts == ([0, 0, 24] if numeric else [12, 12])
    assert manifest.label_names == (["0", "1", "2"] if numeric else ["cat", "dog.v2"])
    assert check.main([str(out / "train")]) == 0


@pytest.mark.parametrize("numeric", [False, True])
def test_a_parquet_list_becomes_the_shards_of_its_csv(photographs, tmp_path, numeric):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    paths = sorted(photographs.rglob("img*"))
    table = {
        "image": [str(path.relative_to(tmp_path)) for path in paths],
        "label": [int("dog" in str(path)) if numeric else path.parent.name for path in paths],
    }
    write_table(pyarrow.table(table), tmp_path / "list.parquet")
    rows = [f"{image},{label}" for image, label in zip(*table.values(), strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["image,label", *rows]))
    hashes = []
    for kind in ("parquet", "csv"):
        command = ["--source", "list", "--path", str(tmp_path / f"list.{kind}")]
        assert write.main([*command, "--out", str(tmp_path / kind)]) == 0
        hashes.append([entry.sha256 for entry in resolve(str(tmp_path / kind / "train")).entries])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None])
def test_a_parquet_file_that_is_none_is_said_in_a_line(tmp_path, capsys, content):
    path = tmp_path / "list.parquet"
    if content is not None:
        path.write_bytes(content)
    command = ["--source", "list", "--path", str(path), "--out", str(tmp_path / "out")]
    assert write.main(command) == 2
    said = capsys.readouterr().err
    assert "list.parquet is n" in said
    assert said.count("\n") == 1


def test_a_list_without_the_named_column_says_which_it_has(tmp_path, capsys):
    (tmp_path / "list.csv").write_text("file,species\na.png,cat\n")
    command = ["--source", "list", "--path", str(tmp_path / "list.csv")]
    assert write.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "row 1 has no 'image' (columns: file, species)" in capsys.readouterr().err


def test_a_torchvision_dataset_becomes_shards_by_its_timm_name(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 30), ("t10k", 10)):
        pixels, labels = bytes(count * 784), bytes(n % 10 for n in range(count))
        header = struct.pack(">4B3i", 0, 0, 8, 3, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels)
        header = struct.pack(">4Bi", 0, 0, 8, 1, count)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels)
    command = ["--source", "dataset", "--name", "torch/fashion_mnist", "--path", str(tmp_path)]
    assert write.main([*command, "--out", str(tmp_path / "out")]) == 0
    manifest = read_manifest(tmp_path / "out" / "val" / "manifest.json")
    assert (manifest.samples, manifest.class_counts, manifest.modes) == (10, [1] * 10, {"L": 10})
    assert manifest.label_names[9] == "Ankle boot"


def test_a_dataset_that_is_not_there_is_said_in_a_line(tmp_path, capsys):
    command = ["--source", "dataset", "--name", "torch/fashion_mnist", "--path", str(tmp_path)]
    assert write.main([*command, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "Dataset not found" in told
    assert "let torchvision download it to --path" in told


def test_items_of_any_dataset_object_keep_their_encoded_bytes(photographs):
    paths = sorted(photographs.rglob("img*.jpg"))
    as_bytes = [{"image": {"bytes": path.read_bytes()}, "label": 1} for path in paths]
    as_file = [(path.open("rb"), 1) for path in paths]
    for dataset in (as_bytes, as_file):
        split = dataset_split(dataset, "x", label_names=["a", "b"])
        reference = split.references[3]
        assert (reference.key, reference.label) == ("x00000003", 1)
        assert reference.read() == paths[3].read_bytes()


def test_a_folder_that_cannot_be_written_is_said_in_a_line(photographs, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    assert write.main(from_folder(photographs, tmp_path / "taken")) == 2
    said = capsys.readouterr().err
    assert "File exists" in said
    assert said.count("\n") == 1


def test_images_can_be_encoded_anew(photographs, tmp_path):
    out = tmp_path / "out"
    command = from_folder(photographs, out)
    assert write.main([*command, "--encode", "webp"]) == 0
    with tarfile.open(out / "train" / "000000.tar") as tar:
        kinds = {member.name.rpartition(".")[2] for member in tar}
    assert kinds == {"webp", "cls"}
    assert check.main([str(out / "train")]) == 0


def test_a_folder_with_other_shards_is_not_mixed_into(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "precious.tar").write_bytes(b"")
    command = from_folder(photographs, out)
    assert write.main(command) == 2
    assert "precious.tar and 0 more" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["cow", "cow/shards", "cat/shards"])
def test_shards_that_are_written_among_the_classes_become_none(photographs, inside, capsys):
    out = photographs / inside
    command = [*from_folder(photographs, out), "--held-out", "0.25"]
    assert write.main(command) == 0
    written = {name: (out / name / "manifest.json").read_text() for name in ("train", "val")}
    (out / "val" / "manifest.json").unlink()  # as if it had been stopped
    assert write.main(command) == 0
    assert "complete already" in capsys.readouterr().out
    for name, text in written.items():
        assert (out / name / "manifest.json").read_text() == text


@pytest.mark.parametrize("decoded", [1, 256])
def test_a_cut_image_is_in_neither_the_shard_nor_the_manifest(
    photographs, tmp_path, monkeypatch, decoded
):
    """Also behind the images whose pixels are looked at for the mean."""
    monkeypatch.setattr("data.statistics.PIXEL_SAMPLES", decoded)
    for name in ("img.2.png", "img.3.jpg"):
        path = photographs / "cat" / name
        path.write_bytes(path.read_bytes()[:-3000])
    out = tmp_path / "out"
    command = from_folder(photographs, out)
    assert write.main(command) == 0
    manifest = read_manifest(out / "train" / "manifest.json")
    assert (manifest.samples, manifest.class_counts) == (22, [10, 12])
    assert len(read_index(out / "train" / "000000.tar", 22)) == 22
    skipped = [json.loads(line) for line in (out / "train/skipped.jsonl").open()]
    assert {line["key"] for line in skipped} == {"cat/broken", "cat/img_2", "cat/img_3"}


def test_whatever_a_dataset_raises_costs_that_sample_alone(tmp_path):
    class Item(NamedTuple):
        key: str
        label: int = 0

        def read(self) -> bytes:
            if self.key == "bad":
                raise KeyError("image")
            return png(0)

    split = Split([Item("good"), Item("bad")], ["x"])
    manifest = write_split(split, tmp_path / "out", 10, Encoding(), max_skipped=0.5)
    assert manifest.samples == 1
    skipped = json.loads((tmp_path / "out/skipped.jsonl").read_text())
    assert skipped == {"key": "bad", "reason": "cannot be read (KeyError: 'image')"}


def test_two_writers_of_one_set_are_not_at_work_at_once(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    with write.alone_in(out):
        assert write.main(from_folder(photographs, out)) == 2
    assert "another data.write is at work" in capsys.readouterr().err
    assert write.main(from_folder(photographs, out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["train"]


def test_a_disk_without_locks_serves(photographs, tmp_path, monkeypatch):
    """As Lustre where it is mounted without them."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert write.main([*from_folder(photographs, tmp_path / "out"), "--max-skipped", "0.5"]) == 0
