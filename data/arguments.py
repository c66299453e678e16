"""Numbers on a command line: one out of range is refused by its option's name, before any work."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number from `least` to `most`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not _within(value := int(text), least, most):
            between = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r}; give a whole number {between}")
        return value

    return number


def share(text: str) -> float:
    """A type for argparse: a share of a whole, from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give a number from 0 to below 1")
    return value


def _within(value: int, least: int, most: int | None) -> bool:
    return least <= value and (most is None or value <= most)
