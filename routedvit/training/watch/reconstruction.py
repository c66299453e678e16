"""Masked autoencoding made visible: probe images, what is left of them, what the decoder tells.

The same images under the same masks every time, so that a row of pictures over the steps shows
learning alone. The prediction is taken by a forward hook on the decoder, while the objective runs
as it does in training: under ZeRO-3 weights exist only inside that forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import routedvit.drawing as drawing
from routedvit.training.evaluators.inference import inference
from routedvit.training.interfaces import MetricWriter, RoutingMonitor
from routedvit.training.objectives.masked import MaskedObjective


class ReconstructionMonitor:
    """Writes the picture `reconstruction`, see `drawing.reconstruction_sheet`.

    Args:
        objective: what is trained.
        probe: float32 [B, C, H, W], normalised images, the same on every rank.
        writer: where the picture goes; on ranks other than 0 the null writer.
        mean, std: what the images were normalised with, per channel.
        rank: only rank 0 draws.
        also: a monitor that runs at the same steps, for the routing.
    """

    def __init__(
        self,
        objective: MaskedObjective,
        probe: Tensor,
        writer: MetricWriter,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        also: RoutingMonitor | None = None,
    ) -> None:
        self._objective = objective
        self._probe = probe
        self._writer = writer
        self._mean, self._std = mean, std
        self._rank = rank
        self._also = also

    def run(self, model: nn.Module, step: int) -> None:
        """Collective: encodes and decodes the probe images; `model` is that of the objective."""
        objective = self._objective
        told: list[tuple[Tensor, tuple[int, int], Tensor]] = []

        def keep(decoder: nn.Module, arguments: Any, prediction: Tensor) -> None:
            told.append((arguments[1], arguments[2], prediction))

        image = self._probe.to(next(model.parameters()).device)
        position = torch.arange(len(image), device=image.device)
        hook = objective.decoder.register_forward_hook(keep)
        try:
            with inference(objective):
                objective(image, position, position)
        finally:
            hook.remove()
        if self._rank == 0:
            visible, grid, prediction = told[0]
            pictures = (image, objective.picture(image, prediction))
            images, predictions = (
                drawing.denormalize(picture, self._mean, self._std) for picture in pictures
            )
            sheet = drawing.reconstruction_sheet(
                images, predictions, visible, grid, title=f"step {step}"
            )
            self._writer.image("reconstruction", sheet, step)
        if self._also is not None:
            self._also.run(model, step)
