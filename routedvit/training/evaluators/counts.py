"""Sums over all ranks, and the proof that they hold every sample once."""

from torch import Tensor, distributed

from routedvit.training.config.base import ConfigError


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place; as they are where there is one. Collective."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def check_counts(name: str, seen: float, unusable: float, announced: int) -> None:
    """Every held-out sample was evaluated or could not be read, and some were evaluated.

    Raises:
        RuntimeError: the batches of all ranks hold more or fewer samples than the set.
        ConfigError: none of the images can be read.
    """
    if seen + unusable != announced:
        raise RuntimeError(
            f"{name}: {seen:.0f} samples were evaluated and {unusable:.0f} are unusable, the set "
            f"has {announced}. The shards differ from their manifest, or ranks read different "
            "lists."
        )
    if not seen:
        raise ConfigError(
            f"data.val: none of the {announced} held-out images can be read; "
            "`python -m data.check SHARDS` says why"
        )
