"""A finished set is only gone on with by the command that wrote it: no image changes its split."""

from __future__ import annotations

import shutil

import pytest

from data import write
from data.manifest import read_manifest, write_manifest
from data.shards import resolve
from data.tar_index import read_index
from tests.unit.data.making import png


@pytest.fixture
def source(tmp_path):
    """Two classes of ten images."""
    for name in ("oak", "elm"):
        (tmp_path / "trees" / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "trees" / name / f"{number}.png").write_bytes(png(number, (20, 20)))
    return tmp_path / "trees"


@pytest.fixture
def run(source, tmp_path, capsys):
    """run(*options) -> exit code, standard output, standard error."""

    def run(*options: str) -> tuple[int, str, str]:
        command = ["--source", "folder", "--path", str(source), "--out", str(tmp_path / "out")]
        code = write.main([*command, *options])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ([], ["--held-out", "0.2"], "--held-out 0 and this command says 0.2"),
        (["--held-out", "0.2"], [], "--held-out 0.2 and this command says 0"),
        ([], ["--resize", "10"], "--resize nothing and this command says 10"),
        (["--encode", "jpg"], ["--encode", "webp"], "--encode jpg and this command says webp"),
        (["--encode", "jpg"], ["--encode", "jpg", "--quality", "50"], "--quality 90 and"),
        ([], ["--shard-size", "5"], "--shard-size 1000 and this command says 5"),
    ],
)
def test_another_command_is_refused_in_words_and_changes_nothing(run, tmp_path, first, then, words):
    assert run(*first)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    code, _, said = run(*then)
    assert code == 2
    assert words in said
    assert said.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("harmless", [["--jobs", "2"], ["--quality", "50"], ["--max-skipped", "0"]])
def test_options_that_change_no_shard_are_not_held_against_it(run, harmless):
    assert run()[0] == 0
    code, said, _ = run(*harmless)
    assert (code, "complete already" in said) == (0, True)


def test_val_is_not_written_beside_a_train_split_of_other_samples(run, source, tmp_path):
    assert run("--held-out", "0.2")[0] == 0
    shutil.rmtree(tmp_path / "out/val")
    (source / "oak/new.png").write_bytes(png(10))
    code, _, said = run("--held-out", "0.2")
    assert code == 2
    assert "train was written from other samples than its source lists now" in said
    (source / "oak/new.png").unlink()
    assert run("--held-out", "0.2")[0] == 0
    keys = {path: set(keys_of(tmp_path / "out" / path)) for path in ("train", "val")}
    assert (len(keys["train"]), len(keys["val"])) == (16, 4)
    assert not keys["train"] & keys["val"]


def keys_of(folder):
    indices = [read_index(folder / entry.name) for entry in resolve(str(folder)).entries]
    return [key for index in indices for key in index.keys.tolist()]


def test_val_is_not_written_beside_a_train_split_of_unknown_origin(run, tmp_path):
    assert run("--held-out", "0.2")[0] == 0
    train = tmp_path / "out/train"
    unknown = read_manifest(train / "manifest.json").model_copy(update={"recipe": None})
    write_manifest(train, unknown)
    assert "complete already" in run("--held-out", "0.2")[1]
    shutil.rmtree(tmp_path / "out/val")
    code, _, said = run("--held-out", "0.2")
    assert code == 2
    assert "does not say how it was written, so val could share images with it" in said


def test_the_manifest_says_how_the_set_was_written_and_tells_no_home_folder(run, tmp_path):
    assert run("--resize", "10")[0] == 0
    recipe = read_manifest(tmp_path / "out/train/manifest.json").recipe
    assert recipe["--path"] == "trees"
    assert recipe["--resize"] == "10"
    assert "--name" not in recipe
