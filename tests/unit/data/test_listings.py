"""Lists and dataset objects become samples, or one line says what is wrong with them."""

from __future__ import annotations

import io
import tarfile
from types import SimpleNamespace

import pytest
from PIL import Image

from data import listings, write
from data.errors import DataError
from data.listings import dataset_split, list_splits, named_dataset_splits
from data.manifest import MAX_CLASSES, read_manifest
from tests.unit.data.making import png


@pytest.fixture
def said(tmp_path, capsys):
    """said(list as bytes, *options) -> exit code and the error of writing it."""

    def write_list(content: bytes, *options: str) -> tuple[int, str]:
        (tmp_path / "list.csv").write_bytes(content)
        command = ["--source", "list", "--path", str(tmp_path / "list.csv")]
        code = write.main([*command, "--out", str(tmp_path / "out"), *options])
        return code, capsys.readouterr().err

    return write_list


def manifest_in(tmp_path):
    return read_manifest(tmp_path / "out/train/manifest.json")


def test_what_excel_saves_is_read(tmp_path, said):
    """That is UTF-8 behind a byte order mark."""
    (tmp_path / "a.png").write_bytes(png(0))
    assert said("image,label\r\na.png,größer\r\n".encode("utf-8-sig")) == (0, "")
    assert manifest_in(tmp_path).label_names == ["größer"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image,label\na.png,größer\n".encode("latin-1"), "list.csv is no UTF-8 text"),
        (b'image,label\n"' + b"x" * 200_000 + b'",1\n', "cannot be read as CSV: field larger"),
        (b"image,label\na.png,0\nb.png,-1\n", "label -1; classes are numbered from 0"),
        (b"image,label\na.png,48901000\n", "label 48901000; classes are numbered from 0"),
        (b"image,label\na.png,  \n", "row 1 has no 'label'"),
        (b"image;label\na.png;0\n", "(columns: image;label); columns stand between commas"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_in_a_line(said, content, words):
    code, error = said(content)
    assert (code, words in error, error.count("\n")) == (2, True, 1)


def test_an_image_listed_twice_is_not_held_out(tmp_path, said):
    """It might be in train and in val; without --held-out it may weigh double."""
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(0))
    content = b"image,label\na.png,0\nb.png,0\n./a.png,0\n"
    code, error = said(content, "--held-out", "0.5")
    assert (code, "row 3 lists ./a.png again (row 1)" in error) == (2, True)
    assert said(content) == (0, "")


def test_whole_numbers_that_pandas_made_fractions_are_classes(tmp_path, said):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png(0))
    assert said(b"image,label\na.png,2.0\nb.png,10.0\nc.png,0.0\n") == (0, "")
    assert manifest_in(tmp_path).class_counts == [1, 0, 1, *[0] * 7, 1]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [((" cat", "cat ", "dog"), ["cat", "dog"]), ((" 1", "0 ", "1"), ["0", "1"])],
)
def test_space_around_a_label_makes_no_class(tmp_path, said, labels, classes):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png(0))
    rows = "".join(f"{name}.png,{label}\n" for name, label in zip("abc", labels, strict=True))
    assert said(b"image,label\n" + rows.encode()) == (0, "")
    assert manifest_in(tmp_path).label_names == classes


@pytest.mark.parametrize("image", [b"\x89PNG", {"bytes": b"\x89PNG", "path": "a.png"}])
def test_a_table_that_holds_images_is_no_list_of_files(tmp_path, capsys, image):
    """Hugging Face exports such ones; their bytes were printed as a name."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"image": [image], "label": [0]})
    parquet.write_table(table, tmp_path / "list.parquet")
    command = ["--source", "list", "--path", str(tmp_path / "list.parquet")]
    assert write.main([*command, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert ("'image' holds images themselves" in error, error.count("\n")) == (True, 1)


def test_a_label_that_is_no_number_at_all_is_missing(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"image": ["a.png"], "label": [float("nan")]})
    parquet.write_table(table, tmp_path / "list.parquet")
    command = ["--source", "list", "--path", str(tmp_path / "list.parquet")]
    assert write.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "row 1 has no 'label'" in capsys.readouterr().err


def test_a_folder_as_list_is_said_in_a_line(tmp_path, capsys):
    command = ["--source", "list", "--path", str(tmp_path), "--out", str(tmp_path / "out")]
    assert write.main(command) == 2
    assert "is a folder; name the file that lists the images, or take" in capsys.readouterr().err


def test_identifiers_become_classes_when_they_are_called_names(tmp_path, said):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
    content = b"image,label\na.png,48901000\nb.png,-1\n"
    assert "give --labels-are-names" in said(content)[1]
    assert said(content, "--labels-are-names") == (0, "")
    assert manifest_in(tmp_path).label_names == ["-1", "48901000"]


def test_the_largest_class_number_is_one_below_the_limit(tmp_path):
    path = tmp_path / "list.csv"
    for label, fits in ((MAX_CLASSES - 1, True), (MAX_CLASSES, False)):
        path.write_text(f"image,label\na.png,{label}\n")
        if fits:
            names = list_splits(path, "image", "label", 0)["train"].label_names
            assert len(names) == MAX_CLASSES
        else:
            with pytest.raises(DataError, match=f"label {label}"):
                list_splits(path, "image", "label", 0)


def test_files_are_named_in_the_shard_by_what_they_hold(tmp_path, said):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
    contents = {"plain": png(0), "b.jfif": buffer.getvalue(), "c.jpg": png(1)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    rows = "".join(f"{name},0\n" for name in contents)
    assert said(f"image,label\n{rows}".encode()) == (0, "")
    with tarfile.open(tmp_path / "out/train/000000.tar") as tar:
        assert {"plain.png", "b.jpg", "c.png"} <= set(tar.getnames())


def items(*labels: object) -> list[dict]:
    return [{"img": Image.new("L", (4, 4)), "fine_label": label} for label in labels]


def test_columns_of_items_can_be_named():
    split = dataset_split(items(1, 0), "x", image_column="img", label_column="fine_label")
    assert [reference.label for reference in split.references] == [1, 0]
    assert split.references[0].read().startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"no 'image' \(columns: img, fine_label\)"):
        dataset_split(items(1, 0), "x")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, -1], "label -1"),
        ([0, 48901000], "label 48901000"),
        ([0, "cat"], "label 'cat' is no class number"),
        ([0, None], "label None is no class number"),
        ([], "the x split is empty"),
    ],
)
def test_labels_that_number_no_class_are_refused(labels, words):
    with pytest.raises(DataError, match=words):
        dataset_split(items(*labels), "x", image_column="img", label_column="fine_label")


def test_more_classes_than_names_are_refused():
    pairs = [(Image.new("L", (4, 4)), 2)]
    with pytest.raises(DataError, match="label 2 and 2 class names"):
        dataset_split(pairs, "x", label_names=["a", "b"])


def test_columns_are_passed_on_to_hugging_face_alone(tmp_path, monkeypatch):
    asked = []

    def create(name: str, **options: object) -> list:
        asked.append((name, options.get("input_key"), options.get("target_key")))
        return [(Image.new("L", (4, 4)), 0)]

    monkeypatch.setattr(listings, "create_dataset", create)
    for name in ("hfds/cifar10", "torch/cifar10"):
        named_dataset_splits(name, tmp_path, {"train": "train"}, "img", "label")
    assert asked == [("hfds/cifar10", "img", "label"), ("torch/cifar10", None, None)]


def test_an_image_that_hugging_face_keeps_as_a_file_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    item = {"image": {"bytes": None, "path": str(tmp_path / "a.png")}, "label": 0}
    assert dataset_split([item], "x").references[0].read() == png(0)


def test_classes_have_the_names_that_hugging_face_gives_them():
    class Kept(list):
        features = {"fine_label": SimpleNamespace(names=["ant", "bee"])}  # noqa: RUF012

    split = dataset_split(Kept(items(1, 0)), "x", image_column="img", label_column="fine_label")
    assert split.label_names == ["ant", "bee"]
