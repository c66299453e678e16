"""Which patches masked autoencoding shows: at random, yet a function of seed and sample alone.

A generator would depend on what it drew before and on the rank that owns it. Here every (seed,
sample, patch) is hashed to an integer and the patches with the smallest ones stay visible, so a run
masks its samples alike on any number of ranks, any device and after a resume. Integer arithmetic
only: 32 bits held in int64, so that no product overflows.
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
