"""Mixup and CutMix that the number of ranks, the micro-batch and a resume do not change.

timm's Mixup mixes image i of a micro-batch with its mirror image B - 1 - i and draws from numpy's
global generator, so what an image is mixed with depends on the machines. Here the samples at global
positions 2j and 2j + 1 are partners: the loader gives both to one rank, in neighbouring rows. What
happens to pair j (mixup, CutMix or nothing; its lambda; its box) is hashed from (seed, j). The
probabilities, the box and the targets are timm's in its mode 'pair', the same lambda for both.

Everything is computed where the images are and nothing waits for the device: Beta-distributed
lambdas come from a table of draws that were made once, on the host.
"""

import numpy as np
import torch
from timm.data.mixup import one_hot
from torch import Tensor

from routedvit.training.config.run import ConfigError
from routedvit.training.recipe.hashing import hashed

__all__ = ["Mixing"]

DRAWS = 1 << 16  # lambdas in the table
_APPLY, _SWITCH, _LAMBDA, _ROW, _COLUMN, _NUMBERS = range(6)  # what a random number is for


class Mixing:
    """Mixes the images of pairs, and their labels.

    Args:
        mixup: alpha of mixup (1710.09412), 0 for none.
        cutmix: alpha of CutMix (1905.04899), 0 for none.
        prob: share of the pairs that are mixed.
        switch_prob: share of CutMix among those, where both alphas are above 0.
        label_smoothing: of the targets, as in timm: off values are smoothing / num_classes.
        num_classes: width of the targets.
        batch_size: rows of a micro-batch.
        seed: the run's.

    Raises:
        ConfigError: the micro-batch is odd, so that an image would have no partner.
    """

    def __init__(
        self,
        mixup: float,
        cutmix: float,
        *,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float,
        num_classes: int,
        batch_size: int,
        seed: int,
    ) -> None:
        if batch_size % 2:
            raise ConfigError(
                f"loss.mixup and loss.cutmix pair the images of a micro-batch, and {batch_size} is "
                "odd; choose an even train.micro_batch_size"
            )
        self.prob = prob
        self.share_of_cutmix = switch_prob if mixup and cutmix else float(cutmix > 0)
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.seed = seed
        # RandomState: its streams never change with numpy's version
        generator = np.random.RandomState(seed % (1 << 32))
        lambdas = [generator.beta(alpha or 1, alpha or 1, DRAWS) for alpha in (mixup, cutmix)]
        self._lambdas = torch.tensor(np.stack(lambdas), dtype=torch.float32, device="cpu")

    def __call__(self, image: Tensor, target: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed images [B, C, H, W] and their targets, float32 [B, num_classes].

        Args:
            image: rows 2i and 2i + 1 are partners; it is not changed.
            target: int64 [B].
            position: int64 [B], even and odd neighbours: 2j, 2j + 1, 2k, 2k + 1, ...
        """
        lam_P, weight_P1HW = self.draw(position[::2] // 2, image.shape[-2], image.shape[-1])
        weight = weight_P1HW.repeat_interleave(2, 0).to(image.dtype)
        image = image * weight + _partner(image) * (1 - weight)
        off = self.label_smoothing / self.num_classes
        labels = one_hot(target, self.num_classes, 1 - self.label_smoothing + off, off)
        lam_B1 = lam_P.repeat_interleave(2).unsqueeze(1)
        return image, labels * lam_B1 + _partner(labels) * (1 - lam_B1)

    def draw(self, pair: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """A pair's lambda, float32 [P], and the weight of each pixel's own image, [P, 1, H, W]."""
        if self._lambdas.device != pair.device:
            self._lambdas = self._lambdas.to(pair.device)
        number = uniform(pair, self.seed)
        row = (number[:, _LAMBDA] * DRAWS).long()
        lam_mixup, lam_cutmix = self._lambdas[0, row], self._lambdas[1, row]
        root = (1 - lam_cutmix).sqrt()
        down = _inside(number[:, _ROW], root, height)
        across = _inside(number[:, _COLUMN], root, width)
        box = down.unsqueeze(2) & across.unsqueeze(1)
        # part of the box may lie outside the image: its area decides, not the lambda drawn
        lam_cutmix = 1 - down.sum(1) * across.sum(1) / (height * width)
        cut = number[:, _SWITCH] < self.share_of_cutmix
        mixed = number[:, _APPLY] < self.prob
        lam = torch.where(mixed, torch.where(cut, lam_cutmix, lam_mixup), 1.0)
        weight = torch.where((mixed & cut)[:, None, None], (~box).float(), lam[:, None, None])
        return lam, weight.unsqueeze(1)


def _partner(rows: Tensor) -> Tensor:
    """Row 2i where row 2i + 1 was, and the other way round."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _inside(centre: Tensor, ratio: Tensor, length: int) -> Tensor:
    """bool [P, length]: the box along one axis, by the rule of timm's rand_bbox."""
    size = (ratio * length).long()
    middle = (centre * length).long()
    at = torch.arange(length, device=centre.device)
    low, high = middle - size // 2, middle + (size + 1) // 2
    return (at >= low.unsqueeze(1)) & (at < high.unsqueeze(1))


def uniform(pair: Tensor, seed: int) -> Tensor:
    """float32 [P, numbers] in [0, 1), hashed from seed, pair and column; the same on any device."""
    words = hashed(pair, _NUMBERS, seed=seed)
    return (words >> 8).float() * 2.0**-24
