"""The held-out loss counts every sample once, each under the draw that its key decides."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routedvit.training.evaluators.held_out_loss import HeldOutLoss

NUM_SAMPLES = 11


class Objective(nn.Module):
    """The loss of a sample is its image times what its position decides."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)

    def forward(self, image: Tensor, target: Tensor, position: Tensor) -> tuple[Tensor, Any]:
        assert not self.training
        losses = image.flatten() * (position % 97)
        return losses.mean(), {"target": target.float().mean()}


class Loader:
    num_samples = NUM_SAMPLES

    def __init__(self, batch_size: int, last: int = NUM_SAMPLES, unusable: int = 0) -> None:
        self.batch_size, self.last, self.unusable = batch_size, last, unusable

    def __iter__(self) -> Iterator[dict[str, Any]]:
        total = 2 * self.batch_size + -(-NUM_SAMPLES // self.batch_size) * self.batch_size
        for rows in torch.arange(total).split(self.batch_size):
            yield {
                "image": rows.float()[:, None],
                "target": rows,
                "key": [f"image/{row}" for row in rows.tolist()],
                "valid": rows < self.last,
                "unusable": self.unusable if rows[0] == 0 else 0,
            }


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_mean_does_not_depend_on_batches_and_padding(batch_size: int) -> None:
    objective = Objective().train()
    evaluator = HeldOutLoss(objective, Loader(batch_size), every_steps=5)
    values = dict(evaluator.run(objective.model))
    losses = [i * (zlib.crc32(f"image/{i}".encode()) % 97) for i in range(NUM_SAMPLES)]
    assert values["loss"] == pytest.approx(sum(losses) / NUM_SAMPLES)
    assert values["target"] == pytest.approx(sum(range(NUM_SAMPLES)) / NUM_SAMPLES)
    assert objective.training
    assert (evaluator.name, evaluator.every_steps) == ("val", 5)


def test_a_lost_sample_is_an_error() -> None:
    objective = Objective()
    with pytest.raises(RuntimeError, match="10 samples were evaluated and 0 are unusable, the set"):
        dict(HeldOutLoss(objective, Loader(4, last=10), every_steps=1).run(objective.model))


def test_an_image_that_cannot_be_read_is_left_out_of_the_mean() -> None:
    objective = Objective()
    whole = dict(HeldOutLoss(objective, Loader(4), every_steps=1).run(objective.model))
    loader = Loader(4, last=10, unusable=1)
    values = dict(HeldOutLoss(objective, loader, every_steps=1).run(objective.model))
    last = 10 * (zlib.crc32(b"image/10") % 97)
    assert values["loss"] == pytest.approx((whole["loss"] * 11 - last) / 10)
    assert values["unusable"] == 1
    assert "unusable" not in whole
