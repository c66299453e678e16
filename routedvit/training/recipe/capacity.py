"""Capacity by step: annealed, or drawn anew in every step so that one model serves many budgets.

The scheduled number is a factor on what each router was built with, at most the whole image: with
capacities of 1/4 for queries and 1/2 for keys, a factor of 2 means 1/2 and 1. Factor 1 is the model
as built, which is what evaluation, pictures and exports see.

Factors come from a short list of levels, since every capacity has shapes of its own: a compiled
block is compiled once per level, and caching allocators see few sizes. The draw depends on seed
and step alone, so it is the same on all ranks and after a resume.

Sampling widths in training: Slimmable networks, 1812.08928; Matryoshka, 2310.07707.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from torch import nn

from routedvit.training.config.run import CapacityConfig, ConfigError

STREAM = 0xCA9AC17  # keeps these draws apart from others made of (seed, step)


class CapacityDial:
    """Multiplies the capacity of every router of `model` by `factor(step)`.

    `model.routers()` gives the routers by name; each has `numerator`, `denominator` and
    `set_capacity(Fraction)`.

    Raises:
        ConfigError: the model has no routers.
    """

    def __init__(self, model: nn.Module, factor: Callable[[int], Fraction]) -> None:
        routers = getattr(model, "routers", None)
        if routers is None:
            raise ConfigError(
                "capacity.schedule needs a model that routes, such as 'colt5_vit_b'; "
                f"{type(model).__name__} does not: set it to 'none'"
            )
        self._routers = [
            (router, Fraction(router.numerator, router.denominator))
            for router in routers().values()
        ]
        self._factor_of = factor
        self.factor = Fraction(1)

    def turn(self, step: int) -> None:
        self.factor = self._factor_of(step)
        self._apply(self.factor)

    def rest(self) -> None:
        self._apply(Fraction(1))

    def scalars(self) -> dict[str, float]:
        return {"train/capacity_factor": float(self.factor)}

    def setting(self) -> str:
        return f"capacity x {self.factor}"

    def _apply(self, factor: Fraction) -> None:
        for router, nominal in self._routers:
            router.set_capacity(min(Fraction(1), factor * nominal))


def scheduled(recipe: CapacityConfig) -> list[Fraction]:
    """The factors that a run takes, in order; [1] without a schedule."""
    if recipe.schedule == "none":
        return [Fraction(1)]
    if recipe.factors:
        return [_ratio(factor) for factor in recipe.factors]
    return levels(recipe.start, recipe.end, recipe.levels)


def levels(start: float, end: float, number: int) -> list[Fraction]:
    """`number` factors from `start` to `end`, evenly spaced, as exact small ratios."""
    steps = [index / (number - 1) for index in range(number)]
    return [_ratio(start + (end - start) * share) for share in steps]


def anneal(factors: Sequence[Fraction], steps: int, shape: str) -> Callable[[int], Fraction]:
    """From the first factor to the last over `steps` steps ('linear' or 'cosine'), then the last.

    Each step takes the nearest of the factors.
    """

    def factor(step: int) -> Fraction:
        share = min(1.0, step / steps)
        if shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return factors[round(share * (len(factors) - 1))]

    return factor


def sample(factors: Sequence[Fraction], seed: int) -> Callable[[int], Fraction]:
    """One of the factors, drawn with equal chances from (seed, step)."""

    def factor(step: int) -> Fraction:
        generator = np.random.default_rng(np.random.SeedSequence((seed, step, STREAM)))
        return factors[int(generator.integers(len(factors)))]

    return factor


def _ratio(value: float) -> Fraction:
    return Fraction(value).limit_denominator(4096)  # 0.1 means 1/10, not its binary neighbour
