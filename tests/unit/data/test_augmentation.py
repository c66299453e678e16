"""Every augmentation of timm follows the sample's position: not the world, workers or a resume."""

from __future__ import annotations

import itertools

import pytest
import torch
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing

from data.config import AugmentConfig
from data.errors import DataError
from data.transforms import train_transform
from routedvit.training.recipe.mixing import Mixing
from tests.unit.data.test_loaders import BATCH, SIZES, train_loader

STEPS = 4
AUGMENTS = {
    "random resized crop and jitter": {"color_jitter": 0.4},
    "RandAugment": {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "3-Augment": {"auto_augment": "3a", "color_jitter": 0.3},
    "AutoAugment": {"auto_augment": "original"},
    "AugMix": {"auto_augment": "augmix-m5-w4-d2"},
    "random erasing": {"re_prob": 0.9, "re_mode": "pixel", "re_count": 2},
    "grey and flips": {"grayscale_prob": 0.5, "vflip": 0.5},
    "repeated": {"repeats": 3, "auto_augment": "rand-m9-mstd0.5-inc1"},
    "random interpolation": {"interpolation": "random"},
}


def batches(config, *, world_size=1, micro=4, start=0, steps=STEPS, **more):
    """All micro-batches of all ranks."""
    for rank in range(world_size):
        loader = train_loader(
            config, rank=rank, world_size=world_size, micro=micro, channels=3, **more
        )
        stream = loader.batches(start)
        yield from itertools.islice(stream, steps * BATCH // (micro * world_size))
        stream.close()


def images(config, **more):
    """position -> image."""
    return {
        position: image
        for batch in batches(config, **more)
        for position, image in zip(batch["position"].tolist(), batch["image"], strict=True)
    }


def assert_same(left, right):
    assert left.keys() <= right.keys()
    assert all(torch.equal(image, right[position]) for position, image in left.items())


@pytest.mark.parametrize("decode", ["fast", "exact"])
@pytest.mark.parametrize("name", AUGMENTS)
def test_a_position_has_the_same_pixels_on_any_world_and_after_a_resume(
    make_set, make_config, name, decode
):
    folder = make_set(SIZES)
    augment = {"mode": "timm", **AUGMENTS[name]}
    plain = make_config(folder, streams=4, augment=augment, decode=decode)
    whole = images(plain)
    assert len(whole) == STEPS * BATCH
    assert_same(images(plain, world_size=4, micro=2), whole)
    workers = plain.model_copy(update={"num_workers": 2})
    assert_same(images(workers, world_size=2, start=2 * BATCH, steps=2), whole)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_travel_as_bytes_where_nothing_follows_their_normalisation(
    make_set, make_config, num_workers
):
    """And are then what a loader process would have made of them, to the last bit."""
    config = make_config(
        make_set(SIZES), streams=4, num_workers=num_workers, augment={"mode": "timm", "vflip": 0.5}
    )
    loader = train_loader(config, channels=3)
    travelling = list(itertools.islice(loader.batches(0), 3))
    loader.dataset.transform.levels = None
    floats = list(itertools.islice(loader.batches(0), 3))
    for batch, expected in zip(travelling, floats, strict=True):
        assert batch["image"].dtype == torch.uint8
        assert expected["image"].dtype == torch.float32
        assert batch["image"].shape == expected["image"].shape
        found = batch["image"].float().mul_(batch["scale"]).sub_(batch["shift"])
        assert torch.equal(found, expected["image"])


def test_erased_images_travel_as_floats(make_set, make_config):
    config = make_config(make_set(SIZES), streams=4, augment={"mode": "timm", "re_prob": 0.5})
    batch = next(train_loader(config, channels=3).batches(0))
    assert batch["image"].dtype == torch.float32
    assert "scale" not in batch


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("RandAugment", RandAugment),
        ("3-Augment", AutoAugment),
        ("AutoAugment", AutoAugment),
        ("AugMix", AugMixAugment),
        ("random erasing", RandomErasing),
    ],
)
def test_the_policies_are_timms_own(name, kind):
    def inside(transform):
        yield transform
        for part in getattr(transform, "transforms", ()):
            yield from inside(part)

    transform = train_transform(
        AugmentConfig.model_validate(AUGMENTS[name]),
        size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear",
    )  # fmt: skip
    assert any(isinstance(part, kind) for part in inside(transform))


def mixed(config, **more):
    """position -> (image, target), mixed by pairs."""
    mixing = Mixing(
        0.8, 1.0, label_smoothing=0.1, num_classes=3, batch_size=more.get("micro", 4), seed=7
    )
    found = {}
    for batch in batches(config, pairs=True, **more):
        position = batch["position"]
        assert torch.equal(position[1::2], position[::2] + 1)
        assert not (position[::2] % 2).any()
        rows = mixing(batch["image"], batch["target"], position)
        found |= {p: row for p, *row in zip(position.tolist(), *rows, strict=True)}
    return found


@pytest.mark.parametrize(
    ("world_size", "micro", "start", "workers"),
    [(1, 16, 0, 0), (2, 4, 0, 0), (2, 2, 0, 2), (4, 4, 0, 0), (4, 2, 2, 1), (1, 8, 3, 0)],
)
def test_mixed_images_and_targets_are_the_same_on_any_world(
    make_set, make_config, world_size, micro, start, workers
):
    config = make_config(make_set(SIZES), streams=8, augment={"mode": "timm", "re_prob": 0.5})
    whole = mixed(config)
    other = config.model_copy(update={"num_workers": workers})
    options = {"world_size": world_size, "micro": micro}
    found = mixed(other, start=start * BATCH, steps=STEPS - start, **options)
    assert sorted(found) == list(range(start * BATCH, STEPS * BATCH))
    for position, (image, target) in found.items():
        assert torch.equal(image, whole[position][0])
        assert torch.equal(target, whole[position][1])


def test_pairs_change_who_reads_a_sample_and_not_the_order(make_set, make_config):
    config = make_config(make_set(SIZES), streams=8)
    keys = {}
    for pairs in (False, True):
        keys[pairs] = {
            position: key
            for batch in batches(config, world_size=4, pairs=pairs)
            for position, key in zip(batch["position"].tolist(), batch["key"], strict=True)
        }
    assert keys[True] == keys[False]


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ({"streams": 8}, {"micro": 1}, r"pair the images of a micro-batch, and 1 is odd"),
        ({"streams": 4}, {"world_size": 4}, r"4 ranks, each with pairs .* 4 streams .* fit: 1, 2;"),
        ({"streams": 4}, {"batch": 18, "micro": 9, "world_size": 2}, r"batch of 18 .* fit: 1;"),
    ],
)
def test_worlds_that_cannot_keep_pairs_together_are_told_which_could(
    make_set, make_config, fields, arguments, words
):
    config = make_config(make_set(SIZES), **fields)
    with pytest.raises(DataError, match=words):
        train_loader(config, pairs=True, **arguments)


def test_a_run_that_stands_in_the_middle_of_a_pair_is_told_so(make_set, make_config):
    loader = train_loader(make_config(make_set(SIZES)), pairs=True)
    with pytest.raises(DataError, match=r"stands at sample 15, in the middle of a pair"):
        loader.batches(15)
