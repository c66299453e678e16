"""Routing made visible: statistics per router and pictures of the routed patches.

The same few probe images go through the model every time, so every curve is about the router and
none about the data. A healthy router has std_over_eps around 1 to 2, few saturated gates, a
selection that still moves early in training, and no patch position that it never takes. What the
statistics catch: saturation (gate gradient zero), a static router (overlap_images near 1, so
never_routed near 1 - k/N), a dead one (std_over_eps near 0). `routing_health` names those.

Every rank must call `run`: under ZeRO-3 a forward gathers parameters from all of them. Only the
writer of rank 0 leads anywhere. Cost: one forward on the probe images and some drawing; nothing in
between, so no hook slows a training step.

Shapes: B probe images, N patches, k of them selected; logits [B, N], gates and indices [B, k].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import routedvit.drawing as drawing
from routedvit.training.evaluators.inference import as_input, inference
from routedvit.training.interfaces import MetricWriter
from routedvit.training.watch.routing_health import RoutingHealth, condition

SATURATED = 0.999
GROUP = "watch_routing"  # TensorBoard sorts its groups: train and val are to come first


class Routing(drawing.Routing, Protocol):
    """What `model.routing(images)` gives per router."""

    @property
    def logits(self) -> Tensor:
        """float32 [B, N]."""


class RoutingMonitor:
    """Writes `watch_routing/<block>/<router>/<statistic>` and a picture per router.

    Args:
        probe: float32 [B, C, H, W], normalised images, the same on every rank
            (`EvalLoader.probe`).
        writer: where the numbers and pictures go; on ranks other than 0 the null writer.
        mean, std: what the images were normalised with, per channel.
        patch: height and width of a patch in pixels; None: the patches fill the images.
        rank: only rank 0 computes statistics and draws.
        tell: told in one line when routers collapse or recover.
    """

    def __init__(
        self,
        probe: Tensor,
        writer: MetricWriter,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        patch: tuple[int, int] | None = None,
        rank: int = 0,
        tell: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._probe = probe
        self._writer = writer
        self._patch = patch
        self._rank = rank
        self._tell = tell
        self._health = RoutingHealth()
        self._pictures = drawing.denormalize(probe, mean, std)
        self._previous: dict[str, Tensor] = {}

    def run(self, model: nn.Module, step: int) -> None:
        """Collective: routes the probe images through `model` as it is after `step` steps."""
        with inference(model):
            routing = model.routing(as_input(self._probe, model))  # type: ignore[operator]
        if self._rank == 0:
            self._write_statistics(routing, step, _routers(model))
            self._write_pictures(routing, step)

    def _write_statistics(
        self, routing: Mapping[str, Routing], step: int, routers: Mapping[str, Any]
    ) -> None:
        selected: dict[str, Tensor] = {}
        last_of_kind: dict[str, Tensor] = {}
        conditions: dict[str, str] = {}
        for name, one in routing.items():
            block, _, router = name.rpartition(".")
            selected[name] = selection(one)
            module = routers.get(name.rstrip("0123456789"))
            values = statistics(
                one,
                getattr(module, "eps", 1.0),
                straight_through=getattr(module, "straight_through", False),
                fetch_ratio=getattr(module, "fetch_ratio", 1.0),
            )
            if name in self._previous:
                _add_overlap(values, "overlap_steps", self._previous[name], selected[name])
            if router in last_of_kind:
                _add_overlap(values, "overlap_blocks", last_of_kind[router], selected[name])
            last_of_kind[router] = selected[name]
            for statistic, value in values.items():
                self._writer.scalar(f"{GROUP}/{_label(block)}/{router}/{statistic}", value, step)
            if module is None or hasattr(module, "eps"):  # the controls are meant to be as they are
                conditions[name] = condition(values)
        self._previous = selected
        self._report(conditions, step)

    def _report(self, conditions: Mapping[str, str], step: int) -> None:
        for change in self._health.changes(conditions):
            self._tell(f"step {step}: {change}")
            self._writer.text("warnings/routing", change, step)
        self._writer.scalar(f"{GROUP}/collapsed_routers", self._health.collapsed, step)

    def _write_pictures(self, routing: Mapping[str, Routing], step: int) -> None:
        for router in dict.fromkeys(name.rpartition(".")[2] for name in routing):
            sheet = drawing.routing_sheet(
                self._pictures, routing, router=router, title=f"step {step}", patch=self._patch
            )
            self._writer.image(f"routed_patches/{router}", sheet, step)


def statistics(
    routing: Routing,
    eps: float = 1.0,
    *,
    straight_through: bool = False,
    fetch_ratio: float = 1.0,
) -> dict[str, float]:
    """Health of one router on a batch of images, each value a mean over the images.

    std_over_eps: spread of the logits in units of the temperature.
    entropy: of softmax(logits / eps), which the gates are before the cap at 1, divided by log N:
        1 is uniform, 0 is one patch.
    mean_gate: of the selected.
    saturated: share of the selected whose gate exceeds 0.999; their gradient is zero. The gates of
        a straight-through router are all 1, so its soft ones are computed, at `fetch_ratio`.
    margin: last selected minus first unselected logit, in units of eps; near 0 the choice is a
        toss-up.
    never_routed: share of the patch positions that no image selects.
    overlap_images: mean intersection over union of the selections of neighbouring probe images.

    Values that need something selected, or something not selected, are absent without it (the
    all-light and all-heavy controls).
    """
    scores = (routing.logits.detach().float() / eps).cpu()
    gates = routing.gates.detach().float().cpu()
    chosen = selection(routing)
    values = {
        "std_over_eps": scores.std(1, correction=0).mean().item(),
        "entropy": normalized_entropy(scores),
        "never_routed": (~chosen.any(0)).float().mean().item(),
    }
    if gates.numel():
        values["mean_gate"] = gates.mean().item()
        if straight_through:
            gates = soft_gates(scores, fetch_ratio * gates.shape[1]).gather(
                1, routing.indices.cpu()
            )
        values["saturated"] = (gates > SATURATED).float().mean().item()
    if chosen.any() and not chosen.all():
        lowest = scores.masked_fill(~chosen, math.inf).amin(1)
        highest = scores.masked_fill(chosen, -math.inf).amax(1)
        values["margin"] = (lowest - highest).mean().item()
        if len(chosen) > 1:
            values["overlap_images"] = overlap(chosen[1:], chosen[:-1])
    return values


def soft_gates(scores: Tensor, total: float) -> Tensor:
    """Gates min(1, exp(z + a)) [B, N] of scores z = logits / eps, with the a that makes them sum to
    `total`, by sorting: with the m largest at 1, a = log(total - m) - logsumexp of the others."""
    if total >= scores.shape[1]:
        return torch.ones_like(scores)
    z = scores.double().sort(1, descending=True).values
    m = torch.arange(z.shape[1], dtype=z.dtype).expand_as(z)
    shift = (total - m).clamp_min(0).log() - z.flip(1).logcumsumexp(1).flip(1)
    first = ((z + shift <= 0) & (m < total)).int().argmax(1, keepdim=True)
    return (scores + shift.gather(1, first)).clamp_max(0).exp().to(scores.dtype)


def selection(routing: Routing) -> Tensor:
    """bool [B, N]: the patches on the heavy path, on the CPU."""
    rows, columns = routing.grid
    chosen = torch.zeros(len(routing.indices), rows * columns, dtype=torch.bool)
    return chosen.scatter_(1, routing.indices.cpu(), True)


def normalized_entropy(scores: Tensor) -> float:
    """Mean entropy of softmax over the last dimension, in units of its maximum log N."""
    if scores.shape[1] == 1:
        return 0.0
    entropy = torch.special.entr(scores.softmax(1)).sum(1)
    return (entropy.mean() / math.log(scores.shape[1])).item()


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean intersection over union of two selections [B, N]."""
    return ((a & b).sum(1) / (a | b).sum(1)).mean().item()


def _add_overlap(values: dict[str, float], name: str, a: Tensor, b: Tensor) -> None:
    # blocks of a hierarchical model may have other grids; the all-light control selects nothing
    if a.shape == b.shape and a.any():
        values[name] = overlap(a, b)


def _routers(model: Any) -> Mapping[str, Any]:
    """The model's router modules by name, where it shows them."""
    return model.routers() if hasattr(model, "routers") else {}


def _label(block: str) -> str:
    """'blocks.3' -> 'block_03', so that names sort by depth."""
    *_, index = block.rpartition(".")
    return f"block_{int(index):02d}" if index.isdigit() else block
