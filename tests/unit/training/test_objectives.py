"""The supervised objective: its losses and what it reports."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from routedvit.training.objectives import SupervisedObjective, build_loss


@pytest.fixture
def objective():
    torch.manual_seed(0)
    return SupervisedObjective(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), build_loss("softmax"))


def test_loss_and_accuracy_of_a_batch(objective):
    image, target = torch.randn(8, 3, 2, 2), torch.randint(0, 3, (8,))
    loss, metrics = objective(image, target)
    logits = objective.model(image)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, target).item())
    assert metrics["top1"].item() == pytest.approx(
        100 * (logits.argmax(1) == target).float().mean().item()
    )
    assert loss.requires_grad
    assert not metrics["top1"].requires_grad


def test_the_loss_is_fp32_for_a_low_precision_model(objective):
    loss, _ = objective.bfloat16()(torch.randn(4, 3, 2, 2).bfloat16(), torch.zeros(4).long())
    assert loss.dtype == torch.float32


def test_label_smoothing_equals_torchs():
    logits, target = torch.randn(8, 5), torch.randint(0, 5, (8,))
    expected = F.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(build_loss("softmax", 0.1)(logits, target), expected)


def test_bce_sums_over_classes():
    logits, target = torch.randn(8, 5), torch.randint(0, 5, (8,))
    onehot = F.one_hot(target, 5).float()
    expected = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none").sum(1).mean()
    torch.testing.assert_close(build_loss("bce")(logits, target), expected)
