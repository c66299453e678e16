"""`python -m data.order` says what the loader serves, for one set, a mixture and a run's config."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import check, order_cli, write
from data.config import DataConfig
from data.mixture import resolve_train
from tests.unit.data.making import amend
from tests.unit.data.test_loaders import BATCH, SIZES, train_loader


def test_order_prints_what_the_loader_serves(make_set, make_config, capsys):
    folder = make_set(SIZES)
    command = ["--shards", str(folder), "--seed", "7", "--shuffle-buffer", "8"]
    command += ["--batch-size", "16", "--steps", "2:4", "--world-size", "2", "--rank", "1"]
    assert order_cli.main([*command, "--micro-batch-size", "4", "--workers", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    batches = train_loader(make_config(folder), rank=1, world_size=2).batches(32)
    served = [next(batches) for _ in range(4)]
    assert [line["key"] for line in lines] == [key for batch in served for key in batch["key"]]
    assert [line["position"] for line in lines] == list(range(33, 64, 2))
    assert [line["worker"] for line in lines[::4]] == [1, 2, 0, 1]


def test_order_counts_steps_from_an_epoch_on_request(make_set, capsys):
    command = ["--shards", str(make_set([10, 11])), "--seed", "0", "--batch-size", "4"]
    assert order_cli.main([*command, "--epoch", "1", "--steps", "0:1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["position"] for line in lines] == [24, 25, 26, 27]
    assert {line["epoch"] for line in lines} == {1}


def test_order_refuses_a_world_that_does_not_fit(make_set, capsys):
    command = ["--shards", str(make_set([5] * 4)), "--seed", "0", "--batch-size", "8"]
    assert order_cli.main([*command, "--steps", "0:1", "--world-size", "3"]) == 2
    assert "rank counts that fit: 1, 2, 4" in capsys.readouterr().err


def served(config, steps, *, world_size=1, micro=4, **more):
    """(position, rank, key, label, epoch) of all rows of the first steps, from the loader."""
    found = []
    for rank in range(world_size):
        loader = train_loader(config, rank=rank, world_size=world_size, micro=micro, **more)
        for batch in itertools.islice(loader.batches(0), steps * BATCH // micro // world_size):
            rows = (batch[name].tolist() for name in ("position", "target", "epoch"))
            for position, label, epoch, key in zip(*rows, batch["key"], strict=True):
                found.append((position, rank, key, label, epoch))
    return sorted(found)


def printed(capsys, *command):
    assert order_cli.main([str(word) for word in command]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ("position", "rank", "key", "label", "epoch")
    return [tuple(line[name] for name in names) for line in lines], lines


MIXTURES = {
    "weights": ({}, ["--weight", 3, "--weight", 1]),
    "sizes": ({}, []),
    "repeated augmentation": ({"augment": {"mode": "light", "repeats": 2}}, ["--repeats", 2]),
    "replacement": ({"replacement": True}, ["--replacement"]),
    "streams": ({"streams": 8}, ["--streams", 8]),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_told_by_sets_and_weights(make_set, make_config, capsys, kind):
    fields, words = MIXTURES[kind]
    folders = [make_set([7, 9, 5, 8], "train"), make_set([3, 4, 6], "other")]
    weights = [3, 1] if kind == "weights" else [None, None]
    sources = [{"shards": str(f), "weight": w} for f, w in zip(folders, weights, strict=True)]
    command = ["--shards", folders[0], "--shards", folders[1], *words]
    command += ["--seed", 7, "--shuffle-buffer", 8, "--batch-size", BATCH, "--steps", "0:6"]
    rows, lines = printed(capsys, *command)
    assert rows == served(make_config(sources, **fields), 6)
    assert {line["source"] for line in lines} == {0, 1}
    assert all(line["shard"].startswith(str(folders[line["source"]])) for line in lines)


def test_sets_of_other_classes_are_told_with_the_labels_of_their_own(make_set, make_config, capsys):
    """The order is of samples; whether a run may read their labels is not asked."""
    names = {"a": ["ant", "bee", "cat"], "b": ["boat", "car", "den"]}
    folders = [amend(make_set([7, 9], name), label_names=names[name]) for name in names]
    command = ["--shards", folders[0], "--shards", folders[1], "--shuffle-buffer", 8]
    rows, lines = printed(capsys, *command, "--seed", 7, "--batch-size", BATCH, "--steps", "0:6")
    config = make_config([{"shards": str(folder)} for folder in folders])
    keys = [row[2] for row in served(config, 6, train=resolve_train(config, labelled=False))]
    assert [line["key"] for line in lines] == keys
    assert all(label == int(key.split("/")[1]) % 3 for _, _, key, label, _ in rows)


@pytest.mark.parametrize("where", ["config", "run folder"])
def test_a_run_config_says_everything(make_set, tmp_path, capsys, where):
    """Also that ranks take pairs of samples where images are mixed."""
    data = {
        "train": [
            {"shards": str(make_set([7, 9, 5, 8], "train")), "weight": 2},
            {"shards": [str(make_set([3, 4, 6], "other"))], "weight": 1},
        ],
        "streams": 4, "shuffle_buffer": 5, "num_workers": 0, "augment": {"mode": "light"},
    }  # fmt: skip
    run = {"seed": 7, "data": data, "loss": {"cutmix": 1.0}}
    run["train"] = {"batch_size": BATCH, "micro_batch_size": 4}
    path = tmp_path / "run" / "config.json"
    path.parent.mkdir()
    config = DataConfig.model_validate(data)
    record = {"config": run | {"data": config.model_dump(mode="json")}, "versions": {}}
    path.write_text(json.dumps(run if where == "config" else record))
    given = path if where == "config" else path.parent
    rows, _ = printed(capsys, "--config", given, "--steps", "0:3", "--world-size", 2)
    assert rows == served(config, 3, world_size=2, pairs=True)
    rows, lines = printed(capsys, "--config", given, "--steps", "0:1", "--epoch", 2)
    assert rows[0][0] == -(-2 * 42 // BATCH) * BATCH
    assert lines[0]["step"] == rows[0][0] // BATCH


def test_a_run_from_before_shards_had_random_starts_is_told_in_its_order(
    make_set, make_config, tmp_path, capsys
):
    """Its record lacks the key; a config that lacks it is of a run to come."""
    sources = [{"shards": str(make_set([9, 8, 7], "train"))}, {"shards": str(make_set([6], "b"))}]
    config = make_config(sources, streams=2, shard_start=None)
    run = {"seed": 7, "train": {"batch_size": BATCH}, "data": config.model_dump(mode="json")}
    del run["data"]["shard_start"]
    (tmp_path / "config.json").write_text(json.dumps({"config": run}))
    (tmp_path / "to_come.json").write_text(json.dumps(run))
    rows, _ = printed(capsys, "--config", tmp_path, "--steps", "0:4")
    assert rows == served(config, 4)
    later, _ = printed(capsys, "--config", tmp_path / "to_come.json", "--steps", "0:4")
    assert later == served(config.model_copy(update={"shard_start": "random"}), 4) != rows


def test_steps_are_where_the_run_took_them_after_it_began_elsewhere_and_went_back(
    make_set, tmp_path, capsys
):
    run = {"seed": 7, "data": {"train": {"shards": str(make_set([10, 11]))}, "streams": 2}}
    run["train"] = {"batch_size": 4}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": run}))
    origin = {"checkpoint": "old", "step": 10, "position": 200}
    (tmp_path / "run" / "checkpoints" / "origin.json").write_text(json.dumps(origin))
    jumps = [{"step": 12, "from": 208, "to": 240}, {"step": 12, "from": 208, "to": 280}]
    (tmp_path / "run" / "checkpoints" / "rollbacks.json").write_text(json.dumps(jumps))
    for given in (tmp_path / "run", tmp_path / "run" / "config.json"):
        rows, _ = printed(capsys, "--config", given, "--steps", "10:14")
        assert [row[0] for row in rows[::4]] == [200, 204, 280, 284]
    _, lines = printed(capsys, "--config", given, "--steps", "0:1", "--epoch", 12)
    assert (lines[0]["step"], lines[0]["position"]) == (12, 280)  # 252 was passed over


def test_the_quickstart_can_be_asked(tmp_path, capsys):
    assert write.main(["--source", "mnist", "--out", str(tmp_path)]) == 0
    run = json.loads((Path(__file__).parents[3] / "configs" / "quickstart.json").read_text())
    run["data"]["train"]["shards"] = str(tmp_path / "train")
    config = tmp_path / "quickstart.json"
    config.write_text(json.dumps(run))
    capsys.readouterr()
    rows, _ = printed(capsys, "--config", config, "--steps", "5:6")
    assert [row[0] for row in rows] == list(range(5 * 128, 6 * 128))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "give either --config or --shards"),
        (["--shards", "x", "--seed", "0"], "--shards needs --batch-size too"),
        (["--shards", "x", "--batch-size", "8"], "--shards needs --seed too"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--config", "pyproject.toml"], "name a run config or a run folder"),
        (["--config", "configs/schema.json"], "is it a run config?"),
        (["--config", "LIST"], "has no data section; is it a run config?"),
        (["--config", "NO BATCH"], "train.batch_size is 0; give the run's global batch"),
    ],
)
def test_what_is_not_said_or_not_there_is_named(tmp_path, capsys, command, words):
    contents = {"LIST": [], "NO BATCH": {"data": {}, "train": {"batch_size": 0}}}
    for name in contents.keys() & set(command):
        (tmp_path / name).write_text(json.dumps(contents[name]))
        command = [str(tmp_path / name) if word == name else word for word in command]
    assert order_cli.main([*command, "--steps", "0:1"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_rank_that_the_world_lacks_is_refused(make_set, capsys):
    command = ["--shards", str(make_set([5] * 4)), "--seed", "0", "--batch-size", "8"]
    command += ["--steps", "0:1", "--world-size", "4"]
    assert order_cli.main([*command, "--rank", "3"]) == 0
    assert order_cli.main([*command, "--rank", "4"]) == 2
    said = capsys.readouterr().err
    assert "--rank is 4 and --world-size 4; ranks are 0 to 3" in said


def test_every_set_of_a_mixture_needs_a_weight_or_none(make_set, capsys):
    command = ["--shards", str(make_set([4])), "--shards", str(make_set([4], "other"))]
    command += ["--seed", "0", "--batch-size", "4", "--steps", "0:1", "--weight", "2"]
    assert order_cli.main(command) == 2
    assert "2 times --shards and 1 times --weight" in capsys.readouterr().err


def test_keys_come_from_the_index_files_alone(make_set, capsys):
    """So a set in a bucket can be asked without fetching it."""
    folder = make_set([5, 6])
    assert check.main(["--write-manifest", str(folder / "*.tar")]) == 0
    command = ["--shards", folder, "--seed", 0, "--batch-size", 4, "--steps", "0:2"]
    capsys.readouterr()
    before, _ = printed(capsys, *command)
    for path in folder.glob("*.tar"):
        path.unlink()
    assert printed(capsys, *command)[0] == before


def test_it_runs_as_a_module(make_set):
    command = [sys.executable, "-m", "data.order", "--shards", str(make_set([5, 6]))]
    command += ["--seed", "0", "--batch-size", "4", "--steps", "0:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4
