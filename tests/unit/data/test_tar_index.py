"""A damaged or hostile shard is refused by name and offset; Python's tarfile would shorten it."""

from __future__ import annotations

import io
import os
import tarfile

import pytest

from data.errors import DataError
from data.tar_index import NO_LABEL, read_index, split_name
from tests.unit.data.making import pair, png, write_tar


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "set.tar"
    write_tar(path, [member for n in range(6) for member in pair(f"s{n}", n, n % 3)])
    return path


def header_offsets(path):
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def patched(path, offset, payload):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(payload)


def test_a_good_shard_gives_every_sample_and_its_bytes(shard):
    index = read_index(shard, 6)
    assert [index.key(n) for n in range(6)] == [f"s{n}" for n in range(6)]
    assert index.labels.tolist() == [0, 1, 2, 0, 1, 2]
    content = shard.read_bytes()
    for n in range(6):
        assert content[index.offsets[n] :][: index.sizes[n]] == png(n)
    assert (index.faults, index.ignored) == ({}, 0)


@pytest.mark.parametrize("member", range(1, 12))
def test_a_cut_at_any_member_border_is_found(shard, member):
    os.truncate(shard, header_offsets(shard)[member])
    with pytest.raises(DataError, match=rf"{shard}: offset \d+: .*cut.*good copy"):
        read_index(shard)


@pytest.mark.parametrize("cut", [100, 700])  # in a header, in a payload
def test_a_cut_anywhere_else_is_found(shard, cut):
    os.truncate(shard, header_offsets(shard)[4] + cut)
    with pytest.raises(DataError, match=r"cut"):
        read_index(shard)


def test_a_cut_and_padded_payload_is_found(shard):
    os.truncate(shard, header_offsets(shard)[4] + 512)
    with pytest.raises(DataError, match=r"a member claims \d+ bytes and the file has 0"):
        read_index(shard)


@pytest.mark.parametrize("byte", [0, 100, 124, 130, 150, 156, 257, 300, 511])
def test_every_flipped_header_bit_is_found(shard, byte):
    offset = header_offsets(shard)[6] + byte
    patched(shard, offset, bytes([shard.read_bytes()[offset] ^ 0x04]))
    with pytest.raises(DataError, match=r"offset"):
        read_index(shard)


@pytest.mark.parametrize("blocks", [1, 2])
def test_zeroed_blocks_do_not_pass_for_the_end(shard, blocks):
    at = header_offsets(shard)[6]
    patched(shard, at, bytes(512 * blocks))
    with pytest.raises(DataError, match=rf"offset {at}: zeroed blocks with data behind them"):
        read_index(shard)


def test_fewer_samples_than_the_manifest_says_are_found(shard):
    with pytest.raises(DataError, match=r"6 samples found and the manifest says 7"):
        read_index(shard, 7)


def test_a_missing_end_block_is_found(shard):
    last = header_offsets(shard)[-1]
    os.truncate(shard, last + 1024 + 512)
    with pytest.raises(DataError, match=r"one of the two end-of-archive blocks"):
        read_index(shard)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (pair("a", 0, 0) + pair("b", 1, 1) + pair("a", 2, 2), r"key 'a' comes a second time"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], r"key 'a' has two images"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.cls", b"2")], r"key 'a' has two labels"),
        (
            [("a.png", b"x"), ("b.png", b"x"), ("a.cls", b"1"), ("b.cls", b"1")],
            r"interleaved .*--sort",
        ),
        (pair("i.1", 0, 0) + pair("i.2", 1, 1) + pair("i.1", 2, 2), r"'i\.1' comes a second time"),
        ([("../../a.png", b"x")], r"unsafe"),
        ([("/etc/a.png", b"x")], r"the member name '/etc/a\.png' is unsafe"),
        ([("x/../../a.png", b"x")], r"unsafe"),
        ([("a\x1b[2J.png", b"x")], r"unsafe"),
        ([("a\u2028b.png", b"x")], r"unsafe"),
        ([("a\x85b.png", b"x")], r"unsafe"),
    ],
)
def test_samples_that_come_twice_or_names_that_lead_out_are_refused(tmp_path, members, words):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=words):
        read_index(tmp_path / "x.tar")


def keys_of(index):
    return [index.key(sample) for sample in range(len(index))]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.png", b"x")], "no label"),
        ([("x.cls", b"0")], "a label and no image"),
        ([("x.gif", b"x"), ("x.cls", b"0")], "an image of type .gif"),
        ([("x.tif", b"x")], "an image of type .tif"),
        ([("x.jpg", b"x"), ("x.json", b"{}"), ("x.txt", b"a cat")], "no label"),  # img2dataset
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_sample_that_lacks_an_image_or_a_label_is_left_out_alone(
    tmp_path, members, reason, before
):
    good = pair("a", 0, 0) + pair("z", 1, 1)
    write_tar(tmp_path / "x.tar", members + good if before else good + members)
    index = read_index(tmp_path / "x.tar", 2)
    assert keys_of(index) == ["a", "z"]
    assert list(index.left_out) == ["x"]
    assert reason in index.left_out["x"]
    with pytest.raises(DataError, match=r"2 samples found \(1 are left out\) and"):
        read_index(tmp_path / "x.tar", 3)


@pytest.mark.parametrize(
    "name", ["README", "LICENSE.txt", "__meta__.json", "._a.png", "d/._b.cls", "d/.DS_Store"]
)
def test_what_is_no_sample_at_all_is_ignored(tmp_path, name):
    junk = [(name, b"words")]
    write_tar(tmp_path / "x.tar", junk + pair("a", 0, 0) + junk + pair("b", 1, 1) + junk)
    index = read_index(tmp_path / "x.tar", 2)
    assert (keys_of(index), index.ignored, index.left_out) == (["a", "b"], 3, {})


def test_names_with_dots_are_cut_at_the_last_where_nothing_is_known_behind_the_first(tmp_path):
    names = ["b.v2", "img.1", "img.2", "at 1.23.45\u202fPM", "a\u200cb.1"]
    extras = [("c.depth.png", b"x"), *pair("c", 9, 2), ("c.seg.png", b"x")]  # WebDataset's rule
    write_tar(
        tmp_path / "x.tar", [m for n, name in enumerate(names) for m in pair(name, n, 1)] + extras
    )
    index = read_index(tmp_path / "x.tar", 6)
    assert keys_of(index) == [*names, "c"]
    assert (index.labels.tolist(), index.ignored) == ([1] * 5 + [2], 2)


@pytest.mark.parametrize(
    ("label", "labels", "parts"),
    [
        (".cls", "cls", ["cat.1", "cat.V2"]),
        (".json", "json:label", ["cat.1", "cat.V2"]),
        (".txt", "none", ["cat.1"]),  # where nothing has a label, a number tells
    ],
)
def test_a_sample_that_its_name_makes_a_part_of_another_is_named(tmp_path, label, labels, parts):
    text = b'{"label": 1}' if label == ".json" else b"1"
    members = [("cat.depth.png", b"x"), ("cat.2.txt", b"x"), ("cat.3.cls.txt", b"x")]
    for number, stem in enumerate(["cat", "cat.1", "cat.V2", "dog.1", "dog.2"]):
        members += [(f"{stem}.png", png(number)), (f"{stem}{label}", text)]
    write_tar(tmp_path / "x.tar", members)
    index = read_index(tmp_path / "x.tar", 3, labels=labels)
    assert keys_of(index) == ["cat", "dog.1", "dog.2"]  # as WebDataset has it, and manifests
    assert list(index.left_out) == parts
    assert all("a part of sample 'cat'" in reason for reason in index.left_out.values())
    assert index.images == {"depth.png": 1, "1.png": 1, "v2.png": 1}
    assert index.ignored == (7 if labels != "none" else 10)


def test_a_sample_within_one_that_is_none_is_named_too(tmp_path):
    members = [("cat.cls", b"1"), ("cat.1.png", png(1)), ("cat.1.cls", b"1")]
    write_tar(tmp_path / "x.tar", members)
    assert list(read_index(tmp_path / "x.tar").left_out) == ["cat.1", "cat"]


def test_names_that_merely_cannot_be_seen_are_names(tmp_path):
    """Thai, Persian, emoji made of several or newer than this Python, soft hyphens, private use."""
    names = ["กำ", "می\u200cروم", "👩\u200d🔬", "🏴\U000e0067\U000e007f", "\U0001faff"]
    names += ["co\xadop", "\u200eשם\u200f", "\u202dC", "\ufeffa", "\ue000", "\U0003ffff"]
    write_tar(tmp_path / "x.tar", [m for n, name in enumerate(names) for m in pair(name, n, 1)])
    assert keys_of(read_index(tmp_path / "x.tar", len(names))) == names


@pytest.mark.parametrize("attribute", ["x" * 70_000, "\udcff\udcfe"])
def test_attributes_of_a_file_are_no_part_of_its_name(tmp_path, attribute):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, payload in pair("größe", 0, 1):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            member.pax_headers = {"SCHILY.xattr.user.note": attribute}
            tar.addfile(member, io.BytesIO(payload))
    assert keys_of(read_index(tmp_path / "x.tar", 1)) == ["größe"]


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_too_long_is_refused(tmp_path, style):
    with tarfile.open(tmp_path / "x.tar", "w", format=style) as tar:
        tar.addfile(tarfile.TarInfo("x" * 5000 + ".png"))
    with pytest.raises(DataError, match=r"a name (record )?of 500. bytes is refused"):
        read_index(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("text", "label", "reason"),
    [
        (b'{"label": 2, "other": [1]}', 2, None),
        (b'{"label": "1"}', 1, None),
        (b'{"label": "cat"}', None, "'label' is b'cat' and no class number"),
        (b'{"label": true}', None, "no class number"),
        (b'{"caption": "cat"}', None, "has no 'label'"),
        (b"[1]", None, "has no 'label'"),
        (b"[" * 99_999, None, "cannot be read"),
        (b'{"label": 2', None, "cannot be read"),
    ],
)
def test_labels_may_be_in_a_json_member(tmp_path, text, label, reason):
    members = [("a.png", png(0)), ("a.json", text), ("a.txt", b"a cat"), ("__meta__.json", b"{}")]
    write_tar(tmp_path / "x.tar", members)
    index = read_index(tmp_path / "x.tar", labels="json:label")
    assert index.labels.tolist() == ([] if label is None else [label])
    assert index.ignored == (1 if label is None else 2)
    if reason is not None:
        assert reason in index.left_out["a"]


def test_images_without_labels_are_of_class_0_where_that_is_asked_for(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png(0)), *pair("b", 1, 5), ("README", b"")])
    index = read_index(tmp_path / "x.tar", 2, labels="none")
    assert (index.labels.tolist(), index.ignored, index.left_out) == ([0, 0], 2, {})


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match=r"link, device, sparse") as caught:
        read_index(tmp_path / "x.tar")
    link = kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
    assert ("--hard-dereference" in str(caught.value)) == link


def test_compressed_tars_are_refused(tmp_path, shard):
    import gzip

    (tmp_path / "x.tar").write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match=r"offset"):
        read_index(tmp_path / "x.tar")


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pth", "meta.pickle", "png.gz"])
def test_code_beside_an_image_sets_the_sample_aside(tmp_path, extension):
    bad = [*pair("a", 0, 0), (f"a.{extension}", b"cos\nsystem\n(S'true'\ntR.")]
    write_tar(tmp_path / "x.tar", bad + pair("b", 1, 1))
    index = read_index(tmp_path / "x.tar")
    assert list(index.faults) == [0]
    assert f"forbidden type .{extension}" in index.faults[0]


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1.0", b"9" * 30, b"\xff", b"1 2"])
def test_a_label_that_is_no_class_number_sets_the_sample_aside(tmp_path, text):
    write_tar(tmp_path / "x.tar", [("a.png", png(0)), ("a.cls", text)])
    index = read_index(tmp_path / "x.tar")
    assert index.labels.tolist() == [NO_LABEL]
    assert "no class number" in index.faults[0]


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_as_tarfile_reads_them(tmp_path, style):
    names = ["n01440764/" + "x" * 90, "./plain", "d" * 60 + "/" + "e" * 60]
    if style != tarfile.USTAR_FORMAT:
        names += ["f" * 180, "ärger/ünder"]
    with tarfile.open(tmp_path / "x.tar", "w", format=style) as tar:
        folder = tarfile.TarInfo("n01440764")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            for extension, payload in (("PNG", png(1)), ("json", b"{}"), ("cls", b"2\n")):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    index = read_index(tmp_path / "x.tar")
    assert [index.key(n) for n in range(len(names))] == [name.removeprefix("./") for name in names]
    assert index.labels.tolist() == [2] * len(names)
    assert index.ignored == len(names)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b/img.v2.jpg", ("a/b/img", "v2.jpg")),
        ("a.b/img.JPG", ("a.b/img", "jpg")),
        ("plain", ("plain", "")),
    ],
)
def test_keys_end_where_webdataset_ends_them(name, parts):
    assert split_name(name) == parts


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_called_that(tmp_path, mode):
    """Not cut: nobody should look for a broken copy."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, f"w:{mode}") as tar:
        tar.addfile(tarfile.TarInfo("a.cls"))
    with pytest.raises(DataError, match=r"it is compressed.*unpack it"):
        read_index(path)
