"""When a router has collapsed: says so once, by name, and once more when it recovers.

A collapsed router trains on without an error and wastes the heavy path, so it must be told. Three
ways, judged from the statistics of the probe images (see `routing_monitor.statistics`):

dead: its scores hardly differ (std/eps below 0.05), so the choice is noise.
saturated: fewer than a tenth of the selected have a gate below 1 and pass it a gradient; random
    scores come to that at std/eps near 10.
static: it takes the same patches from every image (overlap above 0.95): a fixed pattern does as
    well. Early blocks of routed networks tend to it (CoLT5, appendix F).

Routers that take all patches or none have nothing to choose and are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

HEALTHY = "healthy"
DEAD_SPREAD = 0.05
SATURATED_SHARE = 0.9
STATIC_OVERLAP = 0.95

MEANING = {
    "dead": f"scores hardly differ, std/eps below {DEAD_SPREAD}; raise its learning rate or scale",
    "saturated": f"over {SATURATED_SHARE:.0%} of the gates are 1 and pass no gradient; lower the "
    "learning rate, or the capacity if nearly all patches are heavy",
    "static": "the same patches on every image; keep these blocks dense (dense_blocks) or train on",
}


def condition(statistics: Mapping[str, float]) -> str:
    """'healthy', 'dead', 'saturated' or 'static'."""
    if "margin" not in statistics:  # everything or nothing is selected
        return HEALTHY
    if statistics["std_over_eps"] < DEAD_SPREAD:
        return "dead"
    if statistics.get("saturated", 0.0) > SATURATED_SHARE:
        return "saturated"
    if statistics.get("overlap_images", 0.0) > STATIC_OVERLAP:
        return "static"
    return HEALTHY


class RoutingHealth:
    """Remembers every router's condition and words the changes."""

    def __init__(self) -> None:
        self._conditions: dict[str, str] = {}

    @property
    def collapsed(self) -> int:
        """Routers that are not healthy."""
        return sum(each != HEALTHY for each in self._conditions.values())

    def changes(self, conditions: Mapping[str, str]) -> list[str]:
        """A line per condition that routers have come into since the last call, naming them.

        `conditions` by name, such as {'blocks.3.ffn': 'dead'}; a router that was never seen before
        counts as healthy until now.
        """
        changed = defaultdict(list)
        for name, now in conditions.items():
            if now != self._conditions.get(name, HEALTHY):
                changed[now].append(name)
        self._conditions.update(conditions)
        return [
            f"routers healthy again: {', '.join(names)}"
            if now == HEALTHY
            else f"warning: {now} routers ({MEANING[now]}): {', '.join(names)}"
            for now, names in changed.items()
        ]
