"""Broken and hostile data: refused or replaced, counted and named, never passed over in silence."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data.errors import DataError
from tests.unit.data.making import pair, png, vouch, write_tar
from tests.unit.data.test_loaders import eval_loader, train_loader

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'


def bomb(width: int = 16_000, height: int = 12_500) -> bytes:
    """A PNG header that claims 200 million pixels, and next to no data."""

    def chunk(kind: bytes, payload: bytes) -> bytes:
        crc = zlib.crc32(kind + payload)
        return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def many_scans(scans: int, progressive: bool = True) -> bytes:
    """A JPEG that passes so often over its pixels, at ten bytes a time."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="JPEG", progressive=progressive)
    content = buffer.getvalue()
    scan = "ffda 0008 01 0100 00003f00" if not progressive else "ffda 000c 03 010002000300 000001"
    return content[: content.index(b"\xff\xda")] + bytes.fromhex(scan) * scans + b"\xff\xd9"


def sixteen_bit() -> bytes:
    buffer = io.BytesIO()
    Image.new("I;16", (8, 8), 30_000).save(buffer, format="PNG")
    return buffer.getvalue()


def as_format(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, format=name)
    return buffer.getvalue()


BAD_SAMPLES = {
    "cut": ([("bad.png", png(0)[:60]), ("bad.cls", b"0")], "decode"),
    "html": ([("bad.jpg", b"<html>404</html>"), ("bad.cls", b"0")], "no JPEG, PNG or WebP"),
    "eps": ([("bad.jpg", EPS), ("bad.cls", b"0")], "no JPEG, PNG or WebP"),
    "svg": ([("bad.jpg", SVG), ("bad.cls", b"0")], "no JPEG, PNG or WebP"),
    "gif": ([("bad.jpg", as_format("GIF")), ("bad.cls", b"0")], "no JPEG, PNG or WebP"),
    "tiff": ([("bad.png", as_format("TIFF")), ("bad.cls", b"0")], "no JPEG, PNG or WebP"),
    "empty": ([("bad.png", b""), ("bad.cls", b"0")], "no JPEG, PNG or WebP"),
    "bomb": ([("bad.png", bomb()), ("bad.cls", b"0")], "too many pixels"),
    "large": ([("bad.png", bomb(10_000, 6_000)), ("bad.cls", b"0")], "10000 x 6000 pixels"),
    "scans": ([("bad.jpg", many_scans(101)), ("bad.cls", b"0")], "a JPEG of 101 scans; 100 are"),
    "deep": ([("bad.png", sixteen_bit()), ("bad.cls", b"0")], "more than 8 bits"),
    "label": ([("bad.png", png(0)), ("bad.cls", b"cat")], "no class number"),
    "class": ([("bad.png", png(0)), ("bad.cls", b"3")], "label 3 is outside 0..2"),
    "pickle": ([("bad.pkl", b"cos\nsystem\n."), *pair("bad", 0, 0)], "forbidden type .pkl"),
}


def shards_with(tmp_path, members, name="train"):
    """12 samples in 2 shards; the second one of the first shard is `members`."""
    folder = tmp_path / name
    folder.mkdir()
    good = [pair(f"good{n}", n, n % 3) for n in range(11)]
    write_tar(folder / "0.tar", [*good[0], *members, *itertools.chain(*good[1:5])])
    write_tar(folder / "1.tar", list(itertools.chain(*good[5:])))
    vouch(folder, {"0.tar": 6, "1.tar": 6})
    return folder


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_a_bad_sample_is_ledgered_and_its_place_filled(tmp_path, make_config, kind):
    members, reason = BAD_SAMPLES[kind]
    config = make_config(shards_with(tmp_path, members), streams=1)
    loader = train_loader(config, batch=4, ledger_dir=tmp_path / "ledger")
    batches = list(itertools.islice(loader.batches(0), 3))  # one epoch
    keys = [key for batch in batches for key in batch["key"]]
    assert len(keys) == 12
    assert "bad" not in keys
    (line,) = (tmp_path / "ledger" / "bad_samples.train.rank0.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["key"] == "bad"
    assert entry["shard"].endswith("0.tar")
    assert reason in entry["reason"]
    assert keys[entry["position"]] == entry["replaced_by"] == keys[(entry["position"] + 1) % 12]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_no_transform_takes_is_a_bad_sample_by_name(tmp_path, make_config, workers):
    """A traceback would name no sample, and come again after every restart."""
    folder = shards_with(tmp_path, [("bad.png", png(99, (3, 8))), ("bad.cls", b"0")])
    config = make_config(folder, streams=1, num_workers=workers)
    loader = train_loader(config, batch=4, ledger_dir=tmp_path / "ledger")
    whole = loader.dataset.transform

    def refusing(image):
        if image.size == (3, 8):
            raise ValueError("cannot reshape tensor of 0 elements\nand more")
        return whole(image)

    refusing.levels = whole.levels
    loader.dataset.transform = refusing
    keys = [key for batch in itertools.islice(loader.batches(0), 3) for key in batch["key"]]
    assert (len(keys), "bad" in keys) == (12, False)
    (line,) = (tmp_path / "ledger" / "bad_samples.train.rank0.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "bad"
    assert json.loads(line)["reason"] == (
        "cannot be transformed (ValueError: cannot reshape tensor of 0 elements)"
    )


def test_the_replacement_is_the_same_on_every_world(tmp_path, make_config):
    folder = shards_with(tmp_path, BAD_SAMPLES["html"][0])

    def keys(world_size: int, workers: int) -> dict[int, str]:
        found = {}
        for rank in range(world_size):
            config = make_config(folder, streams=2, num_workers=workers)
            loader = train_loader(config, batch=4, micro=2, rank=rank, world_size=world_size)
            for batch in itertools.islice(loader.batches(0), 12 // world_size):
                found |= dict(zip(batch["position"].tolist(), batch["key"], strict=True))
        return found

    assert keys(1, 0) == keys(2, 0) == keys(2, 1) == keys(1, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_past_the_limit_the_run_stops_and_names_the_last(tmp_path, make_config, workers):
    folder = shards_with(tmp_path, BAD_SAMPLES["html"][0])
    config = make_config(folder, max_bad_samples=0, num_workers=workers)
    with pytest.raises(
        DataError, match=r"1 bad train samples.*max_bad_samples = 0.*bad in .*0\.tar"
    ):
        list(itertools.islice(train_loader(config, batch=4).batches(0), 3))


def test_a_bad_sample_met_every_epoch_counts_once(tmp_path, make_config):
    config = make_config(shards_with(tmp_path, BAD_SAMPLES["html"][0]), max_bad_samples=1)
    assert len(list(itertools.islice(train_loader(config, batch=4).batches(0), 12))) == 12


def test_a_bad_sample_alone_in_its_stream_is_replaced_from_the_next_ones(tmp_path, make_config):
    folder = shards_with(tmp_path, BAD_SAMPLES["html"][0])
    config = make_config(folder, streams=8, shuffle_buffer=1)  # four of the streams hold one
    loader = train_loader(config, batch=8, micro=8, ledger_dir=tmp_path / "ledger")
    keys = [key for batch in itertools.islice(loader.batches(0), 15) for key in batch["key"]]
    assert len(keys) == 120
    assert "bad" not in keys
    lines = (tmp_path / "ledger" / "bad_samples.train.rank0.jsonl").read_text().splitlines()
    assert all(json.loads(line)["replaced_by"].startswith("good") for line in lines)


def test_copies_of_an_image_are_not_mixed_with_each_other(tmp_path, make_set, make_config):
    config = make_config(make_set([8]), streams=1, augment={"repeats": 2})
    with pytest.raises(DataError, match=r"set data.streams to 2 or more"):
        train_loader(config, pairs=True)
    train_loader(config)


def test_a_stream_without_a_good_sample_is_an_error(tmp_path, make_config):
    folder = tmp_path / "train"
    folder.mkdir()
    write_tar(
        folder / "0.tar", [("a.png", b"x"), ("a.cls", b"0"), ("b.png", b"x"), ("b.cls", b"0")]
    )
    vouch(folder, {"0.tar": 2})
    with pytest.raises(DataError, match=r"no usable sample follows"):
        next(train_loader(make_config(folder), batch=2, micro=2).batches(0))


def test_a_bad_sample_in_evaluation_is_left_out_not_replaced(tmp_path, make_set, make_config):
    val = shards_with(tmp_path, BAD_SAMPLES["html"][0], "val")
    config = make_config(make_set([6]), val={"shards": str(val)})
    loader = eval_loader(config, ledger_dir=tmp_path / "ledger")
    batches = list(loader)
    valid = [bool(ok) for batch in batches for ok in batch["valid"]]
    assert valid == [True, False] + [True] * 10
    assert [batch["unusable"] for batch in batches] == [1, 0, 0]
    assert (tmp_path / "ledger" / "bad_samples.val.rank0.jsonl").exists()
    assert loader.probe(2).shape == (2, 1, 8, 8)


def damaged(make_set, damage):
    folder = make_set([6, 6])
    path = folder / "001.tar"
    content = bytearray(path.read_bytes())
    path.write_bytes(damage(content))
    return folder


DAMAGE = {
    "cut at a member border": (lambda c: c[:4096], "size", r"4096 bytes long and the manifest"),
    "cut, sizes unchecked": (lambda c: c[:4096], "off", r"offset 4096: .*the file is cut"),
    "header bit": (lambda c: c[:2] + bytes([c[2] ^ 1]) + c[3:], "size", r"offset 0: .*checksum"),
    "zeroed block": (lambda c: c[:2048] + bytes(512) + c[2560:], "size", r"zeroed blocks"),
    "payload bit": (lambda c: c[:600] + bytes([c[600] ^ 1]) + c[601:], "sha256", r"SHA-256"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_stops_the_run_by_name(make_set, make_config, kind, workers):
    damage, verify, words = DAMAGE[kind]
    folder = damaged(make_set, damage)
    loader = train_loader(make_config(folder, verify=verify, num_workers=workers), batch=4)
    with pytest.raises(DataError, match=words) as error:
        list(itertools.islice(loader.batches(0), 3))
    assert "001.tar" in str(error.value)
    assert "write it again" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verify", ["size", "sha256"])
def test_a_shard_swapped_for_another_is_refused_before_its_first_sample(
    make_set, make_config, verify
):
    folder = make_set([6, 6])
    os.replace(folder / "000.tar", folder / "001.tar")
    (folder / "000.tar").write_bytes((folder / "001.tar").read_bytes())
    loader = train_loader(make_config(folder, verify=verify), batch=4)
    with pytest.raises(DataError, match=r"001\.tar: offset 0: its SHA-256"):
        list(itertools.islice(loader.batches(0), 3))
    unasked = train_loader(make_config(folder, verify="off"), batch=4)
    assert len(list(itertools.islice(unasked.batches(0), 3))) == 3


def test_a_shard_is_hashed_once_per_rank_not_once_per_worker(make_set, make_config, monkeypatch):
    hashed = make_set([6, 6]).parent / "hashed"

    def counting(descriptor):
        with open(hashed, "a") as file:
            file.write(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name + "\n")
        return original(descriptor)

    import data.reader

    original = data.reader.sha256_of_open
    monkeypatch.setattr(data.reader, "sha256_of_open", counting)
    config = make_config(hashed.parent / "train", verify="sha256")
    loader = train_loader(config, batch=4)
    list(itertools.islice(loader.batches(0), 3))
    loader.config = config.model_copy(update={"num_workers": 2})
    list(itertools.islice(loader.batches(0), 6))
    assert sorted(hashed.read_text().split()) == ["000.tar", "001.tar"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_went_away_or_cannot_be_read_is_named(make_set, make_config, workers):
    folder = make_set([6, 6])
    config = make_config(folder, num_workers=workers, streams=1, verify="off")
    gone, blocked = train_loader(config, batch=4), train_loader(config, batch=4)
    (folder / "001.tar").unlink()
    with pytest.raises(DataError, match=r"001\.tar is in the manifest but not there"):
        list(itertools.islice(gone.batches(0), 3))
    (folder / "001.tar").mkdir()
    with pytest.raises(DataError, match=r"001\.tar: it cannot be read \(Is a directory\)"):
        list(itertools.islice(blocked.batches(0), 3))


def test_evaluation_with_other_classes_than_training_is_refused(make_set, make_config):
    train, val = make_set([6]), make_set([4], "val")
    vouch(val, {"000.tar": 4}, classes=5)
    with pytest.raises(DataError, match=r"\(5 classes\) number their classes differently"):
        eval_loader(make_config(train, val={"shards": str(val)}))
    for folder, names in ((train, ["a", "b", "c"]), (val, ["a", "c", "b"])):
        vouch(folder, {"000.tar": 6 if folder == train else 4})
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"label_names": names}))
    with pytest.raises(DataError, match=r"number their classes differently"):
        eval_loader(make_config(train, val={"shards": str(val)}))
