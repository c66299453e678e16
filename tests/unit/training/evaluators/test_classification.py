"""Evaluation counts every sample once, whatever the batches, the padding and the world size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn

from routedvit.training.config.base import ConfigError
from routedvit.training.evaluators import Classification
from routedvit.training.interfaces import Table

NUM_SAMPLES, NUM_CLASSES = 37, 10


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_SAMPLES, 1, 4, 4, generator=generator)
    return images, torch.randint(0, NUM_CLASSES, (NUM_SAMPLES,), generator=generator)


def build_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, NUM_CLASSES))


class Loader:
    """Rank r reads samples r, r + world, ...; short batches are padded with copies."""

    def __init__(self, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.num_samples = NUM_SAMPLES

    def __iter__(self) -> Iterator[dict[str, Any]]:
        images, targets = samples()
        per_rank = -(-NUM_SAMPLES // (self.world_size * self.batch_size)) * self.batch_size
        index = torch.arange(per_rank) * self.world_size + self.rank
        valid = index < NUM_SAMPLES
        index = index.where(valid, 0)
        for rows in torch.arange(per_rank).split(self.batch_size):
            yield {
                "image": images[index[rows]],
                "target": targets[index[rows]],
                "key": [str(i) for i in index[rows].tolist()],
                "valid": valid[rows],
            }

    def probe(self, n: int) -> torch.Tensor:
        return samples()[0][:n]


def expected() -> dict[str, float]:
    """The plain way: the whole set at once, in eval mode."""
    images, targets = samples()
    with torch.no_grad():
        logits = build_model().eval()(images)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    present = targets.unique()
    of_classes = [(ranks[targets == c] < 1).double().mean().item() for c in present]
    return {
        "class_top1": 100 * sum(of_classes) / len(of_classes),
        "top1": 100 * (ranks < 1).double().mean().item(),
        "top5": 100 * (ranks < 5).double().mean().item(),
        "loss": nn.functional.cross_entropy(logits, targets).item(),
    }


@pytest.mark.parametrize("batch_size", [1, 5, 37, 64])
def test_metrics_do_not_depend_on_batches_and_padding(batch_size: int) -> None:
    assert numbers(Loader(batch_size)) == pytest.approx(expected(), rel=1e-6)


def numbers(loader: Any, model: nn.Module | None = None) -> dict[str, float]:
    findings = Classification(loader, every_steps=1).run(model or build_model())
    return {name: value for name, value in findings if isinstance(value, float)}


def evaluate_on_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    loader = Loader(4, rank, world_size)
    values = numbers(loader)
    Path(folder, f"{rank}.json").write_text(json.dumps(values))
    distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_get_the_metrics_of_one(world_size: int, tmp_path: Path) -> None:
    # fork: the children need no second import of torch, and nothing here has started threads
    multiprocessing.start_processes(
        evaluate_on_rank, (world_size, str(tmp_path)), nprocs=world_size, start_method="fork"
    )
    values = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(one == values[0] for one in values)
    assert values[0] == pytest.approx(expected(), rel=1e-6)


@pytest.mark.parametrize("announced", [36, 38])
def test_a_lost_or_repeated_sample_is_an_error(announced: int) -> None:
    loader = Loader(5)
    loader.num_samples = announced
    with pytest.raises(RuntimeError, match=f"37 samples were evaluated .* the set has {announced}"):
        list(Classification(loader, every_steps=1).run(build_model()))


def test_a_sample_that_cannot_be_read_is_left_out_and_accounted_for() -> None:
    class Damaged(Loader):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            first, *others = super().__iter__()
            first["valid"][0] = False
            yield from [first | {"unusable": 1}, *others]

    images, targets = samples()
    with torch.no_grad():
        logits = build_model().eval()(images[1:])
    loss = nn.functional.cross_entropy(logits, targets[1:]).item()
    found = numbers(Damaged(5))
    assert found["loss"] == pytest.approx(loss)
    assert found["unusable"] == 1
    assert "unusable" not in numbers(Loader(5))


def test_a_set_without_a_readable_image_is_told_with_the_mend() -> None:
    class Unreadable(Loader):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for batch in super().__iter__():
                lost = int(batch["valid"].sum())
                yield batch | {"valid": torch.zeros_like(batch["valid"]), "unusable": lost}

    with pytest.raises(ConfigError, match=r"data\.val: none of the 37 .*python -m data\.check"):
        numbers(Unreadable(5))


def test_accuracy_per_class_worst_first() -> None:
    class Named(Loader):
        label_names = tuple(f"name {c}" for c in range(NUM_CLASSES))

    tables = dict(Classification(Named(5), every_steps=1).run(build_model()))
    table = tables["per_class"]
    assert isinstance(table, Table)
    images, targets = samples()
    with torch.no_grad():
        hit = build_model().eval()(images).argmax(1) == targets
    assert [row[3] for row in table.rows] == sorted(row[3] for row in table.rows)
    assert sum(row[2] for row in table.rows) == NUM_SAMPLES
    for number, name, size, accuracy in table.rows:
        assert name == f"name {number}"
        assert size == (targets == number).sum()
        assert accuracy == pytest.approx(
            100 * hit[targets == number].double().mean().item(), abs=1e-3
        )


def test_train_mode_comes_back_and_a_frozen_part_stays_asleep() -> None:
    model = build_model().train()
    model[1].eval()
    grad_modes: list[bool] = []
    model[2].register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    list(Classification(Loader(8), every_steps=1).run(model))
    assert [module.training for module in model] == [True, False, True]
    assert not any(grad_modes)
    assert torch.is_grad_enabled()


def test_the_model_gets_images_in_its_own_dtype() -> None:
    model = build_model().to(torch.bfloat16)
    values = numbers(Loader(8), model)
    assert values["loss"] == pytest.approx(expected()["loss"], rel=0.02)


def test_top5_of_three_classes_is_everything() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, NUM_CLASSES), nn.Linear(NUM_CLASSES, 3))
    loader = Loader(8)
    evaluator = Classification(ModuloTargets(loader, 3), every_steps=0)
    assert dict(evaluator.run(model))["top5"] == 100.0


class ModuloTargets:
    """`loader` with its targets folded onto fewer classes."""

    def __init__(self, loader: Loader, num_classes: int) -> None:
        self.loader, self.num_classes = loader, num_classes
        self.num_samples = loader.num_samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            yield {**batch, "target": batch["target"] % self.num_classes}

    def probe(self, n: int) -> torch.Tensor:
        return self.loader.probe(n)
