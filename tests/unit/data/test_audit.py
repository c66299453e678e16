"""A run over 2, 1 and 4 ranks, killed and resumed: its ledger holds every sample exactly once."""

from __future__ import annotations

import itertools
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch

from data import audit
from data.errors import DataError
from data.ledger import Ledger
from data.mixture import order_of, resolve_train
from data.reader import ShardReader
from tests.unit.data.making import amend
from tests.unit.data.serving import FaultyServer
from tests.unit.data.test_faults import BAD_SAMPLES, shards_with
from tests.unit.data.test_loaders import BATCH, SIZES, TOTAL, train_loader


def write_config(folder, config, **loss):
    run = {"seed": 7, "train": {"batch_size": BATCH}, "loss": loss}
    run["data"] = config.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps({"config": run}))


def run_steps(folder, config, ranks, first, last, micro=2, **more):
    """Steps [first, last) as `ranks` processes would take them; a micro-batch ahead is made."""
    for rank in range(ranks):
        loader = train_loader(
            config, rank=rank, world_size=ranks, micro=micro, ledger_dir=folder / "logs", **more
        )
        stream = loader.batches(first * BATCH)
        for _ in itertools.islice(stream, (last - first) * BATCH // (micro * ranks)):
            pass
        stream.close()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_runs_of_2_1_and_4_ranks_take_every_sample_once(
    make_set, make_config, run, capsys, workers, pairs
):
    """Resumed mid-epoch on each; the fourth start repeats a step that was not checkpointed."""
    config = make_config(make_set(SIZES), streams=8, num_workers=workers, log_samples=True)
    write_config(run, config, mixup=0.5 * pairs)
    steps = -(-2 * TOTAL // BATCH)
    run_steps(run, config, 2, 0, 2, pairs=pairs)
    run_steps(run, config, 1, 2, 5, pairs=pairs)
    run_steps(run, config, 4, 5, 9, pairs=pairs)
    run_steps(run, config, 2, 8, steps, pairs=pairs)
    assert audit.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert f"positions 0 to {steps * BATCH - 1}; {BATCH} of them again" in said
    for epoch in (0, 1):
        assert f"epoch {epoch}: {TOTAL} of {TOTAL} samples, each exactly once" in said


def test_remote_shards_are_audited_through_the_cache_of_the_run(
    make_set, make_config, run, tmp_path, monkeypatch
):
    make_set([4, 4])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    remote = {"cache_dir": str(tmp_path / "cache"), "give_up_after": 8}
    with FaultyServer(tmp_path) as server:
        config = make_config(f"{server.url}/train", streams=2, log_samples=True, remote=remote)
        write_config(run, config)
        run_steps(run, config, 1, 0, 1)
        fetched = len(server.requests)
        assert audit.main([str(run)]) == 0
        assert {name for name, _ in server.requests[fetched:]} == {"manifest.json"}
        server.shutdown()
    assert not (tmp_path / "home").exists()


def test_half_a_line_of_a_killed_process_takes_no_other_line_with_it(tmp_path):
    ledger = Ledger(tmp_path, "train", rank=0, limit=9, log_samples=True)
    bad = {"shard": "0.tar", "key": "a", "reason": "é"}
    batch = {"position": torch.tensor([3]), "key": ["a"]}
    ledger.record([bad])
    ledger.took(batch)
    for path in (ledger.path, ledger.samples_path):
        with open(path, "a") as file:
            file.write('{"half')
    ledger.record([bad, bad])
    ledger.took(batch)
    for path, whole in (
        (ledger.path, [bad] * 3),
        (ledger.samples_path, [{"position": [3], "key": ["a"]}] * 2),
    ):
        lines = path.read_text().splitlines()
        assert lines.pop(1) == '{"half'
        assert list(map(json.loads, lines)) == whole


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "c", "b"]])
def test_a_mixture_is_audited_source_by_source(make_set, make_config, run, capsys, names):
    """Also one whose classes differ, which a run that reads no labels takes."""
    sources = [make_set([9, 7, 8, 8], "train"), make_set([5, 6, 5], "other")]
    amend(sources[0], label_names=["a", "b", "c"])
    amend(sources[1], label_names=names)
    sections = [{"shards": str(f), "weight": w} for f, w in zip(sources, (3, 1), strict=True)]
    config = make_config(sections, streams=4, log_samples=True)
    write_config(run, config)
    run_steps(run, config, 2, 0, 9, train=resolve_train(config, labelled=False))
    assert audit.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "source 0, epoch 0: 32 of 32 samples, each exactly once" in said
    assert "source 1, epoch 0: 16 of 16 samples, each exactly once" in said


def test_what_was_lost_doubled_or_exchanged_is_named(make_set, make_config, run, capsys):
    config = make_config(make_set(SIZES), streams=4, log_samples=True)
    write_config(run, config)
    run_steps(run, config, 2, 0, 2)
    path = run / "logs" / "samples.rank0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["key"][0] = "someone"  # position 4
    del lines[2]  # positions 8 and 10
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"position": [3')
    assert audit.main([str(run)]) == 1
    said = capsys.readouterr().out
    for words in ("position 4 was someone, the order says train/", "position 8 was never taken"):
        assert words in said
    assert "3 findings" in said


def test_a_run_from_before_shards_had_random_starts_is_held_to_its_own_order(
    make_set, make_config, run, capsys
):
    config = make_config(make_set(SIZES), streams=4, log_samples=True, shard_start=None)
    write_config(run, config)
    run_steps(run, config, 2, 0, 2)
    record = json.loads((run / "config.json").read_text())
    del record["config"]["data"]["shard_start"]
    (run / "config.json").write_text(json.dumps(record))
    assert audit.main([str(run)]) == 0
    write_config(run, config.model_copy(update={"shard_start": "random"}))
    assert audit.main([str(run)]) == 1
    assert "the order says" in capsys.readouterr().out


def test_a_run_that_began_from_anothers_checkpoint_owes_nothing_before_it(
    make_set, make_config, run, capsys
):
    config = make_config(make_set(SIZES), streams=4, log_samples=True)
    write_config(run, config)
    run_steps(run, config, 2, 2, 4)
    assert audit.main([str(run)]) == 1  # samples are missing, as far as it knows
    (run / "checkpoints").mkdir()
    origin = {"checkpoint": "old", "step": 9, "position": 2 * BATCH}
    (run / "checkpoints" / "origin.json").write_text(json.dumps(origin))
    assert audit.main([str(run)]) == 0
    assert f"positions {2 * BATCH} to {4 * BATCH - 1}" in capsys.readouterr().out


def test_a_gap_is_one_line_and_counts_whole(make_set, make_config, run, capsys):
    config = make_config(make_set(SIZES), streams=4, log_samples=True)
    write_config(run, config)
    run_steps(run, config, 2, 0, 1)
    run_steps(run, config, 2, 3, 4)
    assert audit.main([str(run)]) == 1
    said = capsys.readouterr().out
    assert f"positions {BATCH} to {3 * BATCH - 1} were never taken" in said
    assert f"{2 * BATCH} findings" in said


def write_ledger(logs, train, order, steps):
    """What a rank alone writes down that takes `steps`, the last tenth of them twice."""
    reader = ShardReader(train.shards)
    with open(logs / "samples.rank0.jsonl", "w") as file:
        for step in (*range(steps), *range(steps * 9 // 10, steps)):
            positions = np.arange(step * BATCH, (step + 1) * BATCH)
            place = order.locate(positions)
            keys = [reader.key(*at) for at in zip(place.shard, place.sample, strict=True)]
            file.write(json.dumps({"position": positions.tolist(), "key": keys}) + "\n")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_long_run_takes_no_more_memory_than_a_short_one(
    make_set, make_config, tmp_path, monkeypatch, parts
):
    """And epochs of mixed sources, which overlap, are counted whole before they are forgotten."""
    for module in ("mixture", "audit"):
        monkeypatch.setattr(f"data.{module}.TURNS", 128)
    monkeypatch.setattr("data.audit.CHUNK", 256)
    monkeypatch.setattr("data.taken.BLOCK", 4096)
    sections = [{"shards": str(make_set(SIZES))}, {"shards": str(make_set([5, 6, 7, 8], "other"))}]
    config = make_config(sections[:parts], streams=4, log_samples=True)
    train = resolve_train(config)
    peaks = {}
    for steps in (10, 150, 450):  # the first leaves what stays for good, as the indices of shards
        run = tmp_path / f"run{steps}"
        (run / "logs").mkdir(parents=True)
        write_config(run, config)
        write_ledger(run / "logs", train, order_of(train, config, 7), steps)
        tracemalloc.start()
        found = audit.audit(run)
        peaks[steps] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert not found.findings, found.wrong
        assert f"{steps * BATCH} samples taken" in found.report[0]
        whole = [line for line in found.report if f"{TOTAL} of {TOTAL} samples, each" in line]
        assert len(whole) == pytest.approx(steps * BATCH // train.samples_per_epoch, abs=1)
    assert peaks[450] < 1.2 * peaks[150]


def test_substitutes_of_bad_samples_are_known(tmp_path, make_config, run, capsys):
    config = make_config(shards_with(tmp_path, BAD_SAMPLES["html"][0]), streams=1, log_samples=True)
    write_config(run, config)
    run_steps(run, config, 1, 0, 1)
    assert audit.main([str(run)]) == 0
    assert "substitutes for bad ones" in capsys.readouterr().out


def test_substitutes_of_a_quarantined_shard_are_known(make_set, make_config, run, capsys):
    """Without its index file nobody can say which keys it had."""
    folder = make_set(SIZES)
    config = make_config(folder, streams=2, log_samples=True, max_bad_shards=1)
    write_config(run, config)
    os.truncate(folder / "001.tar", 1024)
    run_steps(run, config, 2, 0, 6)
    assert audit.main([str(run)]) == 0
    assert "3 substitutes for bad ones\nepoch 0: 81 of 81" in capsys.readouterr().out
    os.truncate(folder / "002.tar", 1024)  # after the run, which thus replaced nothing of it
    assert audit.main([str(run)]) == 2
    assert "002.tar: offset 1024" in capsys.readouterr().err


def test_a_run_without_a_ledger_says_how_to_get_one(run, capsys):
    with pytest.raises(DataError, match=r"data\.log_samples"):
        audit.audit(run)
    assert audit.main([str(run)]) == 2
