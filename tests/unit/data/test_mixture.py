"""Mixtures keep their shares, each source's epochs exact, and one integer as the whole state."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from data.config import DataConfig
from data.errors import DataError
from data.mixture import TURNS, DrawnOrder, Mixture, order_of, resolve_train
from data.order import SampleOrder
from tests.unit.data.making import amend
from tests.unit.data.test_loaders import train_loader

SIZES = [[40, 13, 27], [5, 6], [31]]
WEIGHTS = [5.0, 1.0, 0.3]


def mixture(streams=4, seed=3, **more):
    orders = [SampleOrder(s, seed=seed, shuffle_buffer=16, streams=streams) for s in SIZES]
    return Mixture(orders, WEIGHTS, seed=seed, **more)


def test_shares_are_exact_in_every_block_and_stream():
    order = mixture()
    positions = np.arange(6 * TURNS * order.streams)
    source, _ = order._own(positions)
    wanted = np.array(WEIGHTS) / sum(WEIGHTS)
    for stream in range(order.streams):
        picks = source[stream :: order.streams]
        for blocks in (1, 2, 6):
            found = np.bincount(picks[: blocks * TURNS], minlength=3)
            assert np.abs(found - wanted * blocks * TURNS).max() <= 1
    assert len({tuple(source[s :: order.streams][:99]) for s in range(order.streams)}) == 4


def test_every_sample_comes_once_in_each_epoch_of_its_source():
    order = mixture()
    place = order.locate(np.arange(6 * TURNS * order.streams))
    shards = [len(sizes) for sizes in SIZES]
    for first, sizes in zip(np.cumsum([0, *shards]), SIZES, strict=False):
        mine = (place.shard >= first) & (place.shard < first + len(sizes))
        last = place.epoch[mine].max()
        for epoch in (0, 1, last - 2):
            rows = mine & (place.epoch == epoch)
            seen = Counter(
                zip(place.shard[rows].tolist(), place.sample[rows].tolist(), strict=True)
            )
            assert set(seen.values()) == {1}
            assert len(seen) == sum(sizes)


def test_the_order_follows_from_the_position_alone():
    positions = np.random.default_rng(0).permutation(3 * TURNS * 4)[:500]
    forwards = mixture().locate(positions)
    one_by_one = [mixture().locate(positions[n : n + 1]) for n in range(0, 500, 50)]
    for number, place in zip(range(0, 500, 50), one_by_one, strict=True):
        assert [int(row[0]) for row in place] == [int(row[number]) for row in forwards]


@pytest.mark.parametrize(
    ("sources", "fields", "digest"),
    [
        (2, {}, "70dee2866430ba14"),
        (2, {"shard_start": None}, "386e9a28ac2bb282"),
        (2, {"replacement": True}, "d2cb70a46ac0ed47"),
        (2, {"augment": {"mode": "light", "repeats": 2}}, "f65308ada2154836"),
        (1, {"augment": {"mode": "light", "repeats": 2}}, "8eaf7858d2f749c4"),
    ],
)
def test_the_order_of_a_given_config_and_seed_never_changes(
    make_set, make_config, sources, fields, digest
):
    """As in test_order, with what a config makes of its sources."""
    train = [
        {"shards": str(make_set([7, 9, 8], "a"))},
        {"shards": str(make_set([5, 5], "b")), "repeat": 3},
    ]
    config = make_config(train[:sources], **fields)
    order = order_of(resolve_train(config), config, seed=11)
    place = order.locate(np.arange(0, 50_000, 97))
    listing = repr([column.tolist() for column in place])
    assert hashlib.sha256(listing.encode()).hexdigest()[:16] == digest


def test_what_stands_in_for_a_sample_is_of_its_source():
    order, seen = mixture(), set()
    source_of = np.repeat(np.arange(len(SIZES)), [len(sizes) for sizes in SIZES])
    for position in range(64):
        own = source_of[order.locate(np.array([position])).shard].tolist()
        assert set(source_of[order.substitutes(position).shard].tolist()) == set(own)
        seen |= set(own)
    assert seen == {0, 1, 2}


def test_repeated_augmentation_repeats_within_a_stream():
    place = mixture(repeats=3).locate(np.arange(24))
    views = Counter(zip(place.shard.tolist(), place.sample.tolist(), strict=True))
    assert list(views.values()) == [3] * 8


def test_a_source_too_rare_to_be_kept_exact_is_refused():
    orders = [SampleOrder([9], seed=0, shuffle_buffer=4, streams=1) for _ in range(2)]
    with pytest.raises(DataError, match=r"data\.train\.1: its share of the samples is 0.001"):
        Mixture(orders, [999.0, 1.0], seed=0)


def test_draws_with_replacement_are_uniform_and_repeatable():
    order = DrawnOrder([30, 50, 20], seed=1, shuffle_buffer=8, streams=4)
    place = order.locate(np.arange(20_000))
    counts = Counter(zip(place.shard.tolist(), place.sample.tolist(), strict=True))
    assert len(counts) == 100
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert 50 < chi_square < 170  # 99 degrees of freedom: p < 1e-5 on either side
    again = DrawnOrder([30, 50, 20], seed=1, shuffle_buffer=8, streams=4)
    assert again.locate(np.array([12_345])).sample == place.sample[12_345]


def served(config, *, world_size=1, start=0, steps=6):
    keys = {}
    for rank in range(world_size):
        loader = train_loader(config, rank=rank, world_size=world_size)
        for batch in itertools.islice(loader.batches(start), steps * 4 // world_size):
            keys |= dict(zip(batch["position"].tolist(), batch["key"], strict=True))
    return [keys[position] for position in sorted(keys)]


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 1)])
def test_any_world_and_any_resume_serve_the_same_mixture(
    make_set, make_config, world_size, workers
):
    train = [
        {"shards": str(make_set([7, 9, 8], "a")), "weight": 2},
        {"shards": str(make_set([5, 5], "b")), "weight": 1},
    ]
    whole = served(make_config(train, streams=4))
    config = make_config(train, streams=4, num_workers=workers)
    assert served(config, world_size=world_size) == whole
    assert served(config, world_size=world_size, start=32, steps=4) == whole[32:]
    assert 0.5 < np.mean([key.startswith("a/") for key in whole]) < 0.85


@pytest.mark.parametrize(
    ("fields", "samples"),
    [({}, 34), ({"samples_per_epoch": 1000}, 1000), ({"replacement": True}, 34)],
)
def test_the_length_of_an_epoch(make_set, make_config, fields, samples):
    a, b = str(make_set([10, 4], "a")), str(make_set([6, 4], "b"))
    config = make_config([{"shards": a}, {"shards": b, "repeat": 2}], **fields)
    loader = train_loader(config)
    assert loader.samples_per_epoch == samples
    assert len(next(loader.batches(0))["key"]) == 4


def test_mean_and_deviation_of_the_pixels_follow_the_shares(make_set, make_config):
    """Not the number of samples: what a model sees of each source."""
    a = amend(make_set([9], "a"), mean=[0.2], std=[0.1])
    b = amend(make_set([3], "b"), mean=[0.6], std=[0.3])
    config = make_config([{"shards": str(a), "weight": 1}, {"shards": str(b), "weight": 3}])
    found = resolve_train(config).shards
    variance = (0.01 + 0.04 + 3 * (0.09 + 0.36)) / 4 - 0.25
    assert (found.mean, found.std) == (pytest.approx([0.5]), pytest.approx([variance**0.5]))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([], "train"),
        ([{"shards": "x", "weight": 1, "repeat": 2}], "give one of them"),
        ([{"shards": "x", "weight": 0}], "weight"),
        ({"shard": "x"}, "shard"),
    ],
)
def test_a_mixture_written_wrong_is_refused(train, words):
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate({"train": train})
