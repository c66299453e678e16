"""Mixup and CutMix by position: timm's distributions and formulas, whatever the machines."""

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target, rand_bbox
from torch._dynamo.testing import CompileCounter

from routedvit.training.recipe.mixing import Mixing, uniform

MANY = torch.arange(20_000)


def mixing(mixup=0.8, cutmix=1.0, **options):
    defaults = {"label_smoothing": 0.1, "num_classes": 5, "batch_size": 8, "seed": 3}
    return Mixing(mixup, cutmix, **(defaults | options))


def batch(rows=8, size=16):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(rows, 3, size, size, generator=generator)
    return image, torch.randint(0, 5, (rows,), generator=generator)


def test_the_numbers_are_uniform_and_not_related():
    numbers = uniform(MANY, 7)
    deciles = np.histogram(numbers.numpy(), bins=10, range=(0, 1))[0] / numbers.numel()
    assert np.abs(deciles - 0.1).max() < 0.005
    together = np.corrcoef(numbers.T.numpy()) - np.eye(numbers.shape[1])
    assert np.abs(together).max() < 0.03
    following = np.corrcoef(numbers[:-1, 2].numpy(), numbers[1:, 2].numpy())[0, 1]
    assert abs(following) < 0.03


def test_numbers_depend_on_all_of_seed_and_pair():
    seen = [uniform(torch.tensor([pair]), seed)[0, 0].item()
            for pair in (0, 1, 1 << 33) for seed in (0, 1, 1 << 33)]  # fmt: skip
    assert len(set(seen)) == 9


def test_what_happens_to_a_pair_never_changes():
    """Neither with numpy's version nor by a refactoring: a resumed run mixes as it did before."""
    lam, weight = mixing(prob=0.9).draw(torch.tensor([0, 1, 2, 3, 4, 1 << 40]), 16, 16)
    expected = [1.0, 0.59375, 0.815457, 0.987691, 0.398438, 0.671875]
    assert lam.tolist() == pytest.approx(expected, rel=1e-5)
    assert (weight == 0).flatten(1).sum(1).tolist() == [0, 104, 0, 0, 154, 84]


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
def test_lambdas_of_mixup_are_beta(alpha):
    lam, _ = mixing(mixup=alpha, cutmix=0).draw(MANY, 4, 4)
    expected = np.random.default_rng(0).beta(alpha, alpha, 20_000)
    quantiles = np.linspace(0.05, 0.95, 19)
    difference = np.quantile(lam.numpy(), quantiles) - np.quantile(expected, quantiles)
    assert np.abs(difference).max() < 0.03


def test_boxes_of_cutmix_are_timms():
    """Same lambda, same centre: same box; and the lambda is what the box leaves."""
    cut = mixing(mixup=0, cutmix=1.0)
    lam, weight = cut.draw(MANY[:300], 20, 28)
    numbers = uniform(MANY[:300], cut.seed)
    for pair in range(300):
        drawn = cut._lambdas[1, int(numbers[pair, 2] * 65536)].item()
        centre = [int(numbers[pair, 3] * 20), int(numbers[pair, 4] * 28)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "randint", lambda *a, c=centre, **k: c.pop(0))
            yl, yh, xl, xh = rand_bbox((20, 28), np.float32(drawn))
        expected = torch.ones(20, 28)
        expected[yl:yh, xl:xh] = 0
        assert torch.equal(weight[pair, 0], expected)
        assert lam[pair].item() == pytest.approx(expected.mean().item(), abs=1e-6)


def test_prob_and_switch_prob_are_shares_of_the_pairs():
    lam, weight = mixing(prob=0.6, switch_prob=0.25).draw(MANY, 8, 8)
    # a CutMix whose box came out empty counts as unmixed in this measure, and is rare
    uneven = weight.flatten(1).min(1).values != weight.flatten(1).max(1).values
    even = ~uneven & (lam < 1)
    assert uneven.float().mean().item() == pytest.approx(0.6 * 0.25, abs=0.015)
    assert even.float().mean().item() == pytest.approx(0.6 * 0.75, abs=0.015)


def test_images_and_targets_follow_timms_formulas():
    mix, (image, target) = mixing(), batch()
    before = image.clone()
    mixed, labels = mix(image, target, torch.arange(8) + 40)
    assert torch.equal(image, before)
    lam, weight = mix.draw(torch.arange(20, 24), 16, 16)
    for pair in range(4):
        a, b = 2 * pair, 2 * pair + 1
        w = weight[pair]
        assert torch.equal(mixed[a], image[a] * w + image[b] * (1 - w))
        assert torch.equal(mixed[b], image[b] * w + image[a] * (1 - w))
        expected = mixup_target(target[a : b + 1], 5, lam[pair].item(), 0.1)
        torch.testing.assert_close(labels[a : b + 1], expected)
    assert not torch.equal(mixed, image)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))


def test_pairs_are_mixed_alike_in_any_micro_batch():
    mix, (image, target) = mixing(), batch(16)
    position = torch.arange(16) + 100
    whole = mix(image, target, position)
    for rows in (range(4, 10), [2, 3, 6, 7, 10, 11, 14, 15]):
        rows = list(rows)
        part = mix(image[rows], target[rows], position[rows])
        assert torch.equal(part[0], whole[0][rows])
        assert torch.equal(part[1], whole[1][rows])


def test_a_low_precision_image_keeps_its_type_and_the_labels_do_not_lose_theirs():
    image, target = batch()
    mixed, labels = mixing()(image.bfloat16(), target, torch.arange(8))
    assert (mixed.dtype, labels.dtype) == (torch.bfloat16, torch.float32)


def test_mixing_compiles_into_one_graph_and_asks_nothing_of_the_host():
    mix = mixing()
    counted = CompileCounter()
    image, target = batch()
    compiled = torch.compile(mix.__call__, backend=counted, fullgraph=True)
    assert torch.equal(
        compiled(image, target, torch.arange(8))[0], mix(image, target, torch.arange(8))[0]
    )
    assert counted.frame_count == 1
