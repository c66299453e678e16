"""What may be written as `shards`, and what is said when it cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.manifest import read_manifest
from data.mixture import resolve_train
from data.reader import ShardReader
from data.shards import expand_braces, match, resolve
from tests.unit.data.making import amend


@pytest.mark.parametrize(
    "pattern", ["", "/manifest.json", "/*.tar", "/{000..002}.tar", "/00{0,1,2}.tar", "/0??.tar"]
)
def test_manifest_folder_glob_and_braces_name_the_same_shards(make_set, pattern):
    folder = make_set([4, 2, 3])
    found = resolve(str(folder) + pattern)
    assert [Path(name).name for name in found.names] == ["000.tar", "001.tar", "002.tar"]
    assert (found.sizes, found.num_samples, found.num_classes) == ([4, 2, 3], 9, 3)


def test_a_list_in_braces_may_be_longer_than_a_name(make_set):
    folder = make_set([1] * 50)
    listed = ",".join(f"{number:03d}.tar" for number in range(50))
    assert resolve(f"{folder}/{{{listed}}}").sizes == [1] * 50
    with pytest.raises(DataError, match=r"no shard matches"):
        resolve(f"{folder}/{'x' * 300}.tar")


def test_a_folder_is_listed_once_for_all_names_of_a_pattern(make_set, monkeypatch):
    """Ranks by the hundred would each ask about tens of thousands of shards, one by one."""
    folder = make_set([4, 2, 3])
    monkeypatch.setattr(Path, "is_file", lambda path: pytest.fail(f"asked about {path}"))
    assert len(match(f"{folder}/{{000..002}}.tar")) == 3
    monkeypatch.chdir(folder)
    assert match("00{0,2}.tar") == ["000.tar", "002.tar"]
    with pytest.raises(DataError, match=r"003\.tar is missing of"):
        match("{000..003}.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("plain", ["plain"]),
        ("a{0..2}", ["a0", "a1", "a2"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{1..003}", ["001", "002", "003"]),
        ("{9..10}{x,y}z", ["9xz", "9yz", "10xz", "10yz"]),
        ("{train}-{,b}", ["{train}-", "{train}-b"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, names):
    assert expand_braces(pattern) == names


def test_several_sets_are_one_with_pooled_statistics(make_set):
    folders = [make_set([4], "a"), make_set([12], "b")]
    for folder, mean, std in zip(folders, (0.2, 0.6), (0.1, 0.3), strict=True):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {"mean": [mean], "std": [std]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        alone = resolve(str(folder))
        assert (alone.mean, alone.std) == ([mean], [std])  # to the last bit
    found = resolve([str(folder) for folder in folders])
    assert found.num_samples == 16
    assert found.mean == pytest.approx([0.5])
    variance = (4 * (0.01 + 0.04) + 12 * (0.09 + 0.36)) / 16 - 0.25
    assert found.std == pytest.approx([variance**0.5])


def test_every_class_has_a_name_where_one_set_of_several_knows_fewer(make_set):
    named = amend(make_set([4], "a"), label_names=["ant", "bee"], class_counts=[3, 1])
    assert resolve([str(named), str(make_set([4], "b"))]).label_names == ["ant", "bee", "2"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{folder}/9*.tar", r"data\.train\.shards: no shard matches .*python -m data\.write"),
        ("{folder}/{{000..005}}.tar", r"003\.tar is missing of"),
        ("{folder}/{{000..", r"unbalanced or nested braces"),
        ("{folder}/{{0..999999999}}.tar", r"stands for 1000001 shards or more"),
        ("{folder}/{{5..2}}.tar", r"stands for 0 shards"),
        ("pipe:cat {folder}/000.tar", r"neither a path nor a URL we read"),
        ("file:///{folder}/000.tar", r"neither a path nor a URL we read"),
        ("http://x/a.tar::s3://y/b.tar", r"neither a path nor a URL we read"),
        ("{folder}/$(touch canary).tar", r"no shard matches"),
        (["{folder}/000.tar", "{folder}/000.tar"], r"twice"),
        ([], r"is empty"),
    ],
)
def test_a_pattern_that_names_nothing_usable_is_refused(make_set, pattern, words):
    folder = make_set([1, 1, 1])
    patterns = [pattern] if isinstance(pattern, str) else pattern
    with pytest.raises(DataError, match=words):
        resolve([part.format(folder=folder) for part in patterns])
    assert not (folder.parent / "canary").exists()


def test_shards_without_a_manifest_are_refused_with_the_command_that_makes_it(make_set):
    folder = make_set([2])
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"python -m data\.check --write-manifest '.*/\*\.tar'"):
        resolve(str(folder / "*.tar"))


def test_a_shard_that_the_manifest_does_not_know_is_refused(make_set):
    folder = make_set([2, 2])
    (folder / "stray.tar").write_bytes((folder / "000.tar").read_bytes())
    with pytest.raises(DataError, match=r"stray\.tar is not in"):
        resolve(str(folder / "*.tar"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 99}, r"samples is 99 but the shards add up to 2"),
        ({"formatt": 1}, r"formatt"),
        ({"std": [float("nan")]}, r"std\.0: .* finite number"),
        ({"shards": [{"name": "../x", "samples": 2, "bytes": 9999, "sha256": "0" * 64}]}, "name"),
        (
            {"shards": [{"name": "x", "samples": 1, "bytes": 9999, "sha256": "0" * 64}] * 2},
            "named twice",
        ),
    ],
)
def test_a_manifest_that_does_not_add_up_is_refused(make_set, change, words):
    path = make_set([2]) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=words):
        read_manifest(path)


def test_a_cut_manifest_is_refused(make_set):
    path = make_set([2]) / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match=r"manifest\.json: the file: Invalid JSON"):
        read_manifest(path)


@pytest.fixture
def apart(indexed, tmp_path):
    """(folder of shards alone, manifest of them elsewhere with index files beside it)."""
    folder, home = indexed([4, 2, 3]), tmp_path / "vouched"
    home.mkdir()
    for path in [*folder.glob("*.index"), folder / "manifest.json"]:
        shutil.move(path, home)
    return folder, home / "manifest.json"


@pytest.mark.parametrize("far", ["nothing", "shards", "manifest", "both"])
@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{000..002}.tar"])
def test_a_manifest_may_lie_elsewhere(apart, server, remote, monkeypatch, far, pattern):
    """Where nobody may write into the bucket; the index files are beside it."""
    folder, manifest = apart
    monkeypatch.setattr("data.reader.index_of", None)  # no shard is walked
    shards = f"{server.url}/train" if far in ("shards", "both") else str(folder)
    home = f"{server.url}/vouched/manifest.json" if far in ("manifest", "both") else str(manifest)
    with pytest.raises(DataError, match=r"manifest\.json"):
        resolve(shards + pattern, remote=remote)
    found = resolve(shards + pattern, remote=remote, manifest=home)
    assert found.sizes == [4, 2, 3]
    reader = ShardReader(found, remote=remote)
    assert reader.read(1, 1).key == "train/0005"


def test_each_source_may_have_its_manifest_elsewhere(apart, make_set):
    folder, manifest = apart
    other = make_set([2], "other")
    sources = [{"shards": str(folder), "manifest": str(manifest)}, {"shards": str(other)}]
    train = resolve_train(DataConfig.model_validate({"train": sources}))
    assert train.shards.manifests == [str(manifest)] * 3 + [str(other / "manifest.json")]
    assert ShardReader(train.shards).read(3, 0).key == "other/0000"


def test_a_manifest_elsewhere_that_cannot_be_meant_is_refused(apart, make_set):
    folder, manifest = apart
    twin = make_set([4], "twin")
    with pytest.raises(DataError, match=r"data\.train\.manifest names one too"):
        resolve(str(twin / "manifest.json"), manifest=str(manifest))
    with pytest.raises(DataError, match=r"twin is a folder; name the manifest\.json in it"):
        resolve(str(folder), manifest=str(twin))
    with pytest.raises(
        DataError, match=r"give the URL again \(--set data\.train\.manifest=\.\.\.\)"
    ):
        resolve(str(folder), manifest="https://h/manifest.json?***")
    with pytest.raises(DataError, match=r"cannot tell apart"):
        resolve([str(folder / "000.tar"), str(twin / "000.tar")], manifest=str(manifest))


@pytest.mark.parametrize(("field", "key"), [("train.0.shards", "train"), ("val.shards",) * 2])
def test_a_url_of_a_record_is_to_be_given_by_a_key_that_can_be_set(field, key):
    with pytest.raises(DataError, match=rf"data\.{field}: .* \(--set data\.{key}=\.\.\.\)"):
        resolve("https://h/a?***", f"data.{field}")


def test_where_a_source_ends_is_part_of_what_a_resumed_run_compares(make_set):
    """It is part of the order of samples, and the same shards may be named in other lists."""
    folder = make_set([4, 2, 3])
    names = [str(folder / f"00{number}.tar") for number in range(3)]

    def fingerprint(*sources):
        train = {"train": [{"shards": list(shards)} for shards in sources]}
        return resolve_train(DataConfig.model_validate(train)).shards.digest()

    assert fingerprint(names[:1], names[1:]) != fingerprint(names[:2], names[2:])
    assert "9 samples in 1 + 2 shards" in fingerprint(names[:1], names[1:])
    assert fingerprint(names) == resolve(names).digest()


def test_a_folder_of_sets_is_told_which_they_are(tmp_path):
    for name in ("val", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"name a set below it: \S+/train or \S+/val$"):
        read_manifest(tmp_path / "manifest.json")
