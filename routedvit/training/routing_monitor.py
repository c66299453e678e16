"""Routing made visible: statistics per router and pictures of the routed patches.

The same few probe images go through the model every time, so every curve is about the router and
none about the data. A healthy router has std_over_eps around 1 to 2, few saturated gates, a
selection that still moves early in training, and no patch position that it never takes. What the
statistics catch: saturation (gate gradient zero), a static router (overlap_steps 1 and the same
patches on every image, so never_routed near 1 - k/N), a dead one (std_over_eps near 0).

Every rank must call `run`: under ZeRO-3 a forward gathers parameters from all of them. Only the
writer of rank 0 leads anywhere. Cost: one forward on the probe images and some drawing; nothing in
between, so no hook slows a training step.

Shapes: B probe images, N patches, k of them selected; logits [B, N], gates and indices [B, k].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

import routedvit.drawing as drawing
from routedvit.training.evaluators.inference import as_input, inference
from routedvit.training.interfaces import MetricWriter

SATURATED = 0.999


class Routing(drawing.Routing, Protocol):
    """What `model.routing(images)` gives per router."""

    @property
    def logits(self) -> Tensor:
        """float32 [B, N]."""


class RoutingMonitor:
    """Writes `routing/<block>/<router>/<statistic>` and a picture per router.

    Args:
        probe: float32 [B, C, H, W], normalised images, the same on every rank
            (`EvalLoader.probe`).
        writer: where the numbers and pictures go; on ranks other than 0 the null writer.
        mean, std: what the images were normalised with, per channel.
        rank: only rank 0 computes statistics and draws.
        eps: temperature of the soft top-k, the unit of logits.
    """

    def __init__(
        self,
        probe: Tensor,
        writer: MetricWriter,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        eps: float = 1.0,
    ) -> None:
        self._probe = probe
        self._writer = writer
        self._rank = rank
        self._eps = eps
        self._pictures = drawing.denormalize(probe, mean, std)
        self._previous: dict[str, Tensor] = {}

    def run(self, model: nn.Module, step: int) -> None:
        """Collective: routes the probe images through `model` as it is after `step` steps."""
        with inference(model):
            routing = model.routing(as_input(self._probe, model))  # type: ignore[operator]
        if self._rank == 0:
            self._write_statistics(routing, step)
            self._write_pictures(routing, step)

    def _write_statistics(self, routing: Mapping[str, Routing], step: int) -> None:
        selected: dict[str, Tensor] = {}
        last_of_kind: dict[str, Tensor] = {}
        for name, one in routing.items():
            block, _, router = name.rpartition(".")
            selected[name] = selection(one)
            values = statistics(one, self._eps)
            if name in self._previous:
                _add_overlap(values, "overlap_steps", self._previous[name], selected[name])
            if router in last_of_kind:
                _add_overlap(values, "overlap_blocks", last_of_kind[router], selected[name])
            last_of_kind[router] = selected[name]
            for statistic, value in values.items():
                self._writer.scalar(f"routing/{_label(block)}/{router}/{statistic}", value, step)
        self._previous = selected

    def _write_pictures(self, routing: Mapping[str, Routing], step: int) -> None:
        for router in dict.fromkeys(name.rpartition(".")[2] for name in routing):
            sheet = drawing.routing_sheet(
                self._pictures, routing, router=router, title=f"step {step}"
            )
            self._writer.image(f"routed_patches/{router}", sheet, step)


def statistics(routing: Routing, eps: float = 1.0) -> dict[str, float]:
    """Health of one router on a batch of images, each value a mean over the images.

    std_over_eps: spread of the logits in units of the temperature.
    entropy: of softmax(logits / eps), which the gates are before the cap at 1, divided by log N:
        1 is uniform, 0 is one patch.
    mean_gate: of the selected.
    saturated: share of the selected whose gate exceeds 0.999; their gradient is zero.
    margin: last selected minus first unselected logit, in units of eps; near 0 the choice is a
        toss-up.
    never_routed: share of the patch positions that no image selects.

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
        values["saturated"] = (gates > SATURATED).float().mean().item()
    if chosen.any() and not chosen.all():
        lowest = scores.masked_fill(~chosen, math.inf).amin(1)
        highest = scores.masked_fill(chosen, -math.inf).amax(1)
        values["margin"] = (lowest - highest).mean().item()
    return values


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


def _label(block: str) -> str:
    """'blocks.3' -> 'block_03', so that names sort by depth."""
    *_, index = block.rpartition(".")
    return f"block_{int(index):02d}" if index.isdigit() else block
