"""The supervised objective: its losses and what it reports."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from routedvit.training.config.run import ConfigError
from routedvit.training.objectives import SupervisedObjective, build_loss, build_mixup


@pytest.fixture
def objective():
    torch.manual_seed(0)
    return SupervisedObjective(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), build_loss("softmax"))


def test_loss_and_accuracy_of_a_batch(objective):
    image, target = torch.randn(8, 3, 2, 2), torch.randint(0, 3, (8,))
    loss, metrics = objective(image, target, torch.arange(len(image)))
    logits = objective.model(image)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, target).item())
    assert metrics["top1"].item() == pytest.approx(
        100 * (logits.argmax(1) == target).float().mean().item()
    )
    assert loss.requires_grad
    assert not metrics["top1"].requires_grad


def test_the_loss_is_fp32_for_a_low_precision_model(objective):
    image, zeros = torch.randn(4, 3, 2, 2).bfloat16(), torch.zeros(4).long()
    loss, _ = objective.bfloat16()(image, zeros, zeros)
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


def test_smoothed_bce_moves_mass_to_all_classes():
    logits, target = torch.randn(8, 5), torch.randint(0, 5, (8,))
    smooth = 0.9 * F.one_hot(target, 5).float() + 0.1 / 5
    expected = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(1).mean()
    torch.testing.assert_close(build_loss("bce", 0.1)(logits, target), expected)


def mixed_objective():
    mixup = build_mixup(0, 1, label_smoothing=0.0, num_classes=3, batch_size=8, seed=0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    return SupervisedObjective(model, build_loss("softmax", mixed=True), mixup)


def test_mixing_follows_the_positions_and_leaves_the_batch_alone():
    objective = mixed_objective()
    image, target = torch.randn(8, 3, 4, 4), torch.randint(0, 3, (8,))
    before = image.clone()
    losses = [objective(image, target, at + torch.arange(8))[0].item() for at in (0, 0, 8)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(image, before)


def test_nothing_is_mixed_in_eval_mode():
    objective = mixed_objective().eval()
    image, target = torch.randn(8, 3, 4, 4), torch.randint(0, 3, (8,))
    losses = {
        objective(image, F.one_hot(target, 3).float(), torch.arange(len(image)))[0].item()
        for _ in range(3)
    }
    assert len(losses) == 1


def test_an_odd_micro_batch_cannot_be_paired():
    with pytest.raises(ConfigError, match=r"7 is odd.*train.micro_batch_size"):
        build_mixup(0.5, 0.0, label_smoothing=0.1, num_classes=3, batch_size=7, seed=0)
    assert build_mixup(0.0, 0.0) is None
