"""Which patches masked autoencoding shows: at random, yet a function of seed and sample alone.

Every patch of a sample gets a number from `recipe.hashing`; those with the smallest stay visible.
"""

from torch import Tensor

from routedvit.training.recipe.hashing import hashed

__all__ = ["visible_patches"]


def visible_patches(position: Tensor, *, num_patches: int, num_visible: int, seed: int) -> Tensor:
    """int64 [B, num_visible] ascending: a uniform draw without replacement for each sample.

    Args:
        position: int64 [B], what the draw of a sample depends on besides the seed.
    """
    # one-to-one for each sample, so that no two patches of it are equal
    noise = hashed(position, num_patches, seed=seed)
    return noise.argsort(1)[:, :num_visible].sort(1).values
