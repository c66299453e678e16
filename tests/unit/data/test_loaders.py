"""What training may rely on: the same batches on any world, exact resume, exact evaluation."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from data.errors import DataError
from data.loaders import build_eval_loader, build_train_loader

SIZES = [7, 3, 11, 5, 2, 9, 8, 4, 6, 10, 3, 13]  # 81 samples in 12 shards
TOTAL = sum(SIZES)
BATCH = 16

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def train_loader(config, *, rank=0, world_size=1, micro=4, batch=BATCH, seed=7, channels=1, **more):
    return build_train_loader(
        config,
        input_size=(channels, 8, 8),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        interpolation="bilinear",
        seed=seed,
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        **more,
    )


def eval_loader(config, *, rank=0, world_size=1, batch_size=4, **more):
    return build_eval_loader(
        config,
        input_size=(1, 8, 8),
        mean=(0.5,),
        std=(0.5,),
        interpolation="bilinear",
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        crop_pct=1.0,
        **more,
    )


def rows(config, *, start, steps, world_size=1, micro=4):
    """position -> (key, target, epoch, image) of `steps` global batches, over all ranks."""
    seen = {}
    for rank in range(world_size):
        loader = train_loader(config, rank=rank, world_size=world_size, micro=micro)
        batches = loader.batches(start)
        for batch in itertools.islice(batches, steps * BATCH // (micro * world_size)):
            for row, position in enumerate(batch["position"].tolist()):
                assert position not in seen
                seen[position] = (
                    batch["key"][row],
                    int(batch["target"][row]),
                    int(batch["epoch"][row]),
                    batch["image"][row].clone(),
                )
        batches.close()
    assert sorted(seen) == list(range(start, start + steps * BATCH))
    return [seen[position] for position in sorted(seen)]


def assert_equal(left, right):
    assert [row[:3] for row in left] == [row[:3] for row in right]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_step_holds_the_same_samples_on_any_world(make_set, make_config, world_size, workers):
    """Keys, labels and augmented pixels, over two epochs of an uneven set."""
    folder = make_set(SIZES)
    steps = -(-2 * TOTAL // BATCH)
    reference = rows(make_config(folder, streams=4), start=0, steps=steps)
    config = make_config(folder, streams=4, num_workers=workers)
    assert_equal(rows(config, start=0, steps=steps, world_size=world_size), reference)
    for epoch in (0, 1):
        keys = Counter(row[0] for row in reference if row[2] == epoch)
        assert len(keys) == TOTAL
        assert set(keys.values()) == {1}


def test_shards_may_be_fewer_than_the_processes_that_read_them(make_set, make_config):
    folder = make_set([40, 41])
    reference = rows(make_config(folder, streams=8), start=0, steps=6)
    config = make_config(folder, streams=8, num_workers=2)
    assert_equal(rows(config, start=0, steps=6, world_size=4, micro=2), reference)


@pytest.mark.parametrize("step", [1, 5, 8])  # within an epoch, at and after its end
@pytest.mark.parametrize(("world_size", "micro"), [(1, 16), (4, 2)])
def test_resuming_at_a_step_equals_never_having_stopped(
    make_set, make_config, step, world_size, micro
):
    config = make_config(make_set(SIZES), streams=4)
    whole = rows(config, start=0, steps=step + 2)
    rest = rows(config, start=step * BATCH, steps=2, world_size=world_size, micro=micro)
    assert_equal(rest, whole[step * BATCH :])


def test_steps_hold_together_when_the_batch_changed_before_a_resume(make_set, make_config):
    """A cursor that is no multiple of the new world still splits one step over the ranks."""
    config = make_config(make_set(SIZES), streams=4)
    whole = rows(config, start=0, steps=4)
    assert_equal(rows(config, start=6, steps=2, world_size=4), whole[6 : 6 + 2 * BATCH])


def test_augmentation_draws_anew_each_epoch_and_leaves_global_generators_alone(
    make_set, make_config
):
    state = torch.get_rng_state()
    config = make_config(make_set(SIZES), streams=4, num_workers=1)
    seen = rows(config, start=0, steps=-(-2 * TOTAL // BATCH))
    assert torch.equal(torch.get_rng_state(), state)
    by_epoch = [{row[0]: row[3] for row in seen if row[2] == epoch} for epoch in (0, 1)]
    changed = sum(not torch.equal(by_epoch[0][key], by_epoch[1][key]) for key in by_epoch[0])
    assert changed > TOTAL * 0.9


def test_a_batch_keeps_the_contract(make_set, make_config):
    loader = train_loader(make_config(make_set(SIZES)))
    batch = next(loader.batches(0))
    assert set(batch) == {"image", "target", "key", "position", "epoch"}
    assert batch["image"].dtype == torch.float32
    assert batch["image"].shape == (4, 1, 8, 8)
    assert batch["target"].dtype == batch["position"].dtype == batch["epoch"].dtype == torch.int64
    assert all(isinstance(key, str) for key in batch["key"])
    assert (loader.samples_per_epoch, loader.num_classes) == (TOTAL, 3)
    assert (loader.mean, loader.std) == ((0.5,), (0.3,))


def test_loader_processes_write_batches_where_the_trainer_reads_them(
    make_set, make_config, monkeypatch
):
    """What they make in other memory is copied on its way."""
    config = make_config(make_set(SIZES), val={"shards": str(make_set([5], "val"))})
    train, val = train_loader(config).dataset, eval_loader(config).dataset
    alone = [train[0]["image"], val[1]["image"]]
    monkeypatch.setattr("data.batches.get_worker_info", object)
    shared = [train[0]["image"], val[1]["image"]]
    assert not any(images.is_shared() for images in alone)
    assert all(images.is_shared() for images in shared)
    assert all(torch.equal(*pair) for pair in zip(alone, shared, strict=True))


def test_grey_images_become_three_channels_for_a_colour_model(make_set, make_config):
    loader = train_loader(make_config(make_set(SIZES)), channels=3)
    images = next(loader.batches(0))["image"]
    assert images.shape == (4, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])
    assert loader.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ({}, {"world_size": 3, "batch": 24}, r"3 ranks do not divide 8 streams .* fit: 1, 2, 4, 8"),
        ({}, {"micro": 3}, r"global batch of 16 is no multiple of micro-batch 3 x 1 ranks"),
        ({}, {"channels": 2}, r"the model takes 2 channels"),
        (
            {"normalize": {"mean": [0.1], "std": [0.2]}},
            {"channels": 3},
            r"data\.normalize gives 1 mean .* 3 channels",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    make_set, make_config, fields, arguments, words
):
    with pytest.raises(DataError, match=words) as error:
        train_loader(make_config(make_set(SIZES), **fields), **arguments)
    assert "\n" not in str(error.value)


def test_drawing_with_replacement_from_urls_is_refused(make_set, make_config, server, remote):
    make_set(SIZES)
    config = make_config(f"{server.url}/train", replacement=True, remote=remote.model_dump())
    with pytest.raises(DataError, match=r"data\.replacement draws .* copy them to a disk"):
        train_loader(config)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 3), (4, 8), (16, 4)])
def test_evaluation_sees_every_sample_once_in_equally_many_batches(
    make_set, make_config, world_size, batch_size, workers
):
    config = make_config(
        make_set(SIZES),
        val={"shards": str(make_set([5, 1, 7], "val"))},
        num_workers=workers,
    )
    keys, counts = [], set()
    for rank in range(world_size):
        loader = eval_loader(config, rank=rank, world_size=world_size, batch_size=batch_size)
        batches = list(loader)
        counts.add(len(batches))
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch["image"].shape == (batch_size, 1, 8, 8)
            assert batch["target"].shape == batch["valid"].shape == (batch_size,)
            keys += [
                key for key, ok in zip(batch["key"], batch["valid"].tolist(), strict=True) if ok
            ]
    assert loader.num_samples == 13
    assert sorted(keys) == [f"val/{number:04d}" for number in range(13)]
    assert len(counts) == 1


def test_the_probe_is_the_head_of_the_set_on_every_rank(make_set, make_config):
    config = make_config(make_set(SIZES), val={"shards": str(make_set([5, 8], "val"))})
    first, second = (eval_loader(config, rank=rank, world_size=2).probe(4) for rank in (0, 1))
    assert first.shape == (4, 1, 8, 8)
    assert torch.equal(first, second)
    assert torch.equal(first, next(iter(eval_loader(config)))["image"])


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_limited_share_of_the_training_images_is_read_unaugmented(
    make_set, make_config, world_size
):
    config = make_config(make_set(SIZES))
    order = {key: n for n, key in enumerate(_keys(eval_loader(config, split="train")))}
    assert len(order) == TOTAL
    keys = []
    for rank in range(world_size):
        loader = eval_loader(config, split="train", limit=20, rank=rank, world_size=world_size)
        assert loader.num_samples == 20
        keys += _keys(loader)
    numbers = sorted(order[key] for key in keys)
    gaps = {later - earlier for earlier, later in itertools.pairwise(numbers)}
    assert len(numbers) == len(set(numbers)) == 20
    assert gaps <= {TOTAL // 20, TOTAL // 20 + 1}  # at even distances
    once, again = (list(eval_loader(config, split="train", limit=8)) for _ in range(2))
    assert torch.equal(once[0]["image"], again[0]["image"])


def _keys(loader):
    return [
        key
        for batch in loader
        for key, valid in zip(batch["key"], batch["valid"].tolist(), strict=True)
        if valid
    ]


def test_evaluation_without_shards_says_what_to_set(make_set, make_config):
    with pytest.raises(DataError, match=r"data\.val\.shards"):
        eval_loader(make_config(make_set(SIZES)))


def test_repeated_augmentation_fills_a_batch_with_different_views(make_set, make_config):
    augment = {"mode": "light", "repeats": 4}
    loader = train_loader(make_config(make_set(SIZES), streams=4, augment=augment), micro=16)
    batch = next(loader.batches(0))
    views = {key: set() for key in batch["key"]}
    for key, image in zip(batch["key"], batch["image"], strict=True):
        views[key].add(image.numpy().tobytes())
    assert [len(images) for images in views.values()] == [4] * 4
