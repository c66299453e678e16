"""Arguments of the routed vision transformer: checked, resolved per block, handed to the blocks."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from routedvit.layers import RoutedBlock, as_ratio

__all__ = ["Capacities", "Capacity", "block_builder", "check_choice", "per_block", "plain"]

Capacity = float | str | Fraction
Capacities = Capacity | Sequence[Capacity]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}"
        )


def per_block(depth: int, **capacities: Any) -> dict[str, list[Fraction]]:
    """Capacities, single or one per block -> one exact ratio per block and router."""
    ratios = {}
    for name, own in capacities.items():
        values = list(own) if isinstance(own, list | tuple) else [own] * depth
        if len(values) != depth:
            raise ValueError(f"{name}_capacity has {len(values)} entries for {depth} blocks")
        ratios[name] = [as_ratio(value, f"{name}_capacity") for value in values]
    return ratios


def plain(capacity: Any) -> Any:
    """The same capacity as JSON can hold it."""
    if isinstance(capacity, list | tuple):
        return [plain(value) for value in capacity]
    return str(capacity) if isinstance(capacity, Fraction) else capacity


def block_builder(
    routed: Callable[..., RoutedBlock], capacities: dict[str, list[Fraction]], dense_blocks: int
) -> Callable[..., RoutedBlock]:
    """What timm's constructor calls for each block; the first `dense_blocks` have no light path
    and no router.
    """

    def build(depth: int, **kwargs: Any) -> RoutedBlock:
        if depth < dense_blocks:
            return routed(
                router="all_heavy", router_kwargs=None, light_heads=0, light_mlp_ratio=0, **kwargs
            )
        own = {f"{name}_capacity": ratios[depth] for name, ratios in capacities.items()}
        return routed(**own, **kwargs)

    return build
