"""Masks of masked autoencoding are a function of seed and position, and random otherwise."""

import torch

from routedvit.training.objectives.masking import visible_patches


def draw(position: torch.Tensor, seed: int = 0, num_patches: int = 49, num_visible: int = 12):
    return visible_patches(position, num_patches=num_patches, num_visible=num_visible, seed=seed)


def test_a_sample_is_masked_alike_in_any_batch_on_any_rank() -> None:
    whole = draw(torch.arange(64))
    ranks = torch.stack([draw(torch.arange(first, 64, 2)) for first in range(2)], 1).flatten(0, 1)
    assert torch.equal(ranks, whole)
    assert torch.equal(draw(torch.tensor([17])), whole[17:18])


def test_these_masks_stay_as_they_are() -> None:
    """Another hash would mask the rest of a resumed run otherwise than its beginning."""
    position = torch.tensor([0, 1, 2**40])
    assert draw(position, seed=5, num_patches=16, num_visible=4).tolist() == [
        [2, 7, 8, 12],
        [0, 3, 12, 14],
        [2, 6, 10, 15],
    ]


def test_visible_patches_are_different_ascending_and_in_range() -> None:
    visible = draw(torch.arange(1000))
    assert visible.dtype == torch.int64
    assert (visible.diff(dim=1) > 0).all()
    assert visible.min() >= 0
    assert visible.max() < 49


def test_every_patch_is_visible_equally_often_and_pairs_are_independent() -> None:
    """Within five standard deviations of a uniform draw without replacement."""
    count, n, v = 20_000, 49, 12
    shown = torch.zeros(count, n).scatter_(1, draw(torch.arange(count)), 1)
    share = v / n
    deviation = (share * (1 - share) / count) ** 0.5
    assert (shown.mean(0) - share).abs().max() < 5 * deviation
    together = shown.T @ shown / count
    expected = share * (v - 1) / (n - 1)
    deviation = (expected * (1 - expected) / count) ** 0.5
    off_diagonal = together[~torch.eye(n, dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 5 * deviation


def test_another_seed_or_position_is_another_mask() -> None:
    position = torch.arange(100)
    base = draw(position)
    for other in (draw(position, seed=1), draw(position, seed=2**32), draw(position + 2**32)):
        assert (base == other).all(1).sum() == 0
    assert len(base.unique(dim=0)) == 100
