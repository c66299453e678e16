"""The package `colt5-attention`, beside which ours is measured, where it is installed."""

from types import ModuleType


def original() -> ModuleType | None:
    """The package, or None after a word: everything else is measured without it."""
    try:
        import colt5_attention
    except ImportError as error:
        print(f"no comparison with colt5-attention: {error}", flush=True)
        return None
    return colt5_attention
