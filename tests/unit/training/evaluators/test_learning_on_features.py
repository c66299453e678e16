"""k-NN and linear probe: what plain code on the whole set gives, on any world size."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.evaluators.features import (
    Features,
    collect,
    feature_batches,
    first_of_each_class,
    gather,
)
from routedvit.training.evaluators.knn import NearestNeighbours, vote
from routedvit.training.evaluators.linear_probe import LinearProbe, fit

CLASSES = 3


class Loader:
    """`number` images of three kinds of stripes; rank r holds r, r + R, ..., padded with zeros."""

    def __init__(self, number: int, seed: int, rank: int = 0, world_size: int = 1, batch: int = 4):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(0, CLASSES, (number,), generator=generator)
        self.images = torch.randn(number, 3, 64, 64, generator=generator)
        for image, target in zip(self.images, self.targets.tolist(), strict=True):
            image[:, :, target::4] += 0.15  # so weak that some are mistaken
        self.num_samples, self.batch = number, batch
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = -(-self.num_samples // (self.world_size * self.batch))
        index = torch.arange(batches * self.batch) * self.world_size + self.rank
        for rows in index.split(self.batch):
            valid = rows < self.num_samples
            rows = rows.where(valid, 0)
            yield {
                "image": self.images[rows] * valid[:, None, None, None],
                "target": self.targets[rows] * valid,
                "valid": valid,
            }


def loaders(rank: int = 0, world_size: int = 1) -> tuple[Loader, Loader]:
    return Loader(41, 0, rank, world_size), Loader(23, 1, rank, world_size)


def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("colt5_vit_test", img_size=64, depth=1, num_classes=7)


def plain_features(images: torch.Tensor) -> torch.Tensor:
    network = model().eval()
    with torch.no_grad():
        return network.forward_head(network.forward_features(images), pre_logits=True)


@functools.cache
def evaluate(rank: int = 0, world_size: int = 1) -> dict[str, float]:
    train, val = loaders(rank, world_size)
    whole, few = learned(train, val), learned(train, val, images_per_class=2)
    return whole | {f"few_{name}": value for name, value in few.items()}


def learned(train: Loader, val: Loader, **options: Any) -> dict[str, Any]:
    """What k-NN and the probe find."""
    knn = NearestNeighbours(train, val, every_steps=0, neighbours=5, **options)
    probe = LinearProbe(train, val, every_steps=0, **options)
    return dict(knn.run(model())) | dict(probe.run(model()))


@pytest.mark.parametrize("name", ["colt5_vit_test", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("classes", [0, 7])
def test_features_are_those_before_the_classifier(name: str, classes: int) -> None:
    network = timm.create_model(name, img_size=64, depth=1, num_classes=classes)
    loader = Loader(5, 0)
    found = gather(collect(feature_batches(network, loader)))
    network.eval()
    with torch.no_grad():
        tokens = network.forward_features(loader.images)
        expected = network.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.target, loader.targets)
    assert not network.get_classifier()._forward_pre_hooks


def test_knn_is_a_weighted_vote_of_the_nearest() -> None:
    train, val = loaders()
    keys = F.normalize(plain_features(train.images), dim=1)
    hits = 0
    for query, target in zip(plain_features(val.images), val.targets.tolist(), strict=True):
        similarity = keys @ F.normalize(query, dim=0)
        votes = [0.0] * CLASSES
        for i in similarity.argsort(descending=True)[:5].tolist():
            votes[int(train.targets[i])] += float((similarity[i] / 0.07).exp())
        hits += votes.index(max(votes)) == target
    assert evaluate()["knn_top1"] == pytest.approx(100 * hits / 23)
    assert evaluate()["knn_top5"] == 100.0  # three classes only


def test_the_probe_minimises_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    inputs[:, -1] = 1
    target = torch.randint(0, CLASSES, (50,), generator=generator)
    weight = fit(inputs, target, CLASSES, l2=0.01, iterations=200).requires_grad_()
    loss = F.cross_entropy(inputs @ weight.T, target) + 0.005 * weight[:, :-1].square().sum()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-5


def test_the_probe_learns_what_the_features_hold() -> None:
    values = evaluate()
    assert values["linear_probe_train_top1"] == 100.0
    assert values["linear_probe_top1"] > 60  # chance is 33


def test_few_images_of_each_class_are_its_first_usable_ones() -> None:
    target = torch.tensor([2, 0, 2, 2, 0, 1, 2])
    valid = torch.tensor([True, False, True, True, True, True, True])
    few = first_of_each_class(Features(torch.randn(7, 4), target, valid), 2)
    assert few.valid.tolist() == [True, False, True, False, True, True, False]


def test_few_shot_learns_from_those_alone() -> None:
    train, val = loaders()
    few = [i for c in range(CLASSES) for i in (train.targets == c).nonzero()[:2, 0].tolist()]
    train.images, train.targets, train.num_samples = train.images[few], train.targets[few], len(few)
    for name, value in learned(train, val).items():
        assert evaluate()[f"few_{name}"] == pytest.approx(value)
    assert evaluate()["few_knn_top1"] != evaluate()["knn_top1"]
    assert evaluate()["few_linear_probe_top1"] != evaluate()["linear_probe_top1"]


def test_autocast_does_not_blur_who_is_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    close = 1 + 1e-3 * torch.randn(40, 8, generator=generator)
    queries, keys = F.normalize(close, dim=1).split(20)
    target = torch.arange(20)
    options = {"num_classes": 20, "neighbours": 3, "temperature": 0.07}
    expected = vote(queries, keys, target, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vote(queries, keys, target, **options), expected)


def run_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    train, _ = loaders(rank, world_size)
    whole = gather(collect(feature_batches(model(), train)))
    np.save(Path(folder, f"{rank}.npy"), whole.features.numpy())
    Path(folder, f"{rank}.json").write_text(json.dumps(evaluate(rank, world_size)))
    distributed.destroy_process_group()


def test_several_ranks_find_what_one_finds(tmp_path: Path) -> None:
    # fork: the children need no second import of torch, and nothing here has started threads
    multiprocessing.start_processes(run_rank, (3, str(tmp_path)), nprocs=3, start_method="fork")
    values = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert values[0] == values[1] == values[2]
    assert values[0] == pytest.approx(evaluate())
    for rank in range(3):  # in the order of the set, without padding
        features = torch.from_numpy(np.load(tmp_path / f"{rank}.npy"))
        torch.testing.assert_close(features, plain_features(loaders()[0].images))


def test_a_low_temperature_counts_the_nearest_alone():
    """exp(s / T) itself is beyond fp32 from s / T = 89 on."""
    keys = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]]), dim=1)
    target = torch.tensor([2, 1, 0])
    votes = vote(keys[:1], keys, target, num_classes=3, neighbours=3, temperature=1e-4)
    assert votes.isfinite().all()
    assert votes.argmax() == 2
