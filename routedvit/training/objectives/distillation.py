"""Distillation: the student learns labels and what a trained teacher says of the same images.

Teacher and student see one and the same crop, mixed images included (2012.12877, 2106.05237).

    loss = (1 - alpha) * loss(student, label) + alpha * distance(student, teacher)

    soft   T^2 * KL(softmax(teacher / T) || softmax(student / T))       Hinton et al., 1503.02531
    hard   cross-entropy against the teacher's first choice             DeiT, 2012.12877
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routedvit.training.objectives.supervised import SupervisedObjective
from routedvit.training.recipe.mixing import Mixing

__all__ = ["DistillationObjective"]


class DistillationObjective(SupervisedObjective):
    """The supervised objective with a teacher beside the labels.

    Reports `top1` against the labels and `agreement`, the share of images in percent for which
    student and teacher choose the same class.

    Args:
        model, loss, mixup: see `SupervisedObjective`.
        teacher: images [B, C, H, W] -> float32 logits [B, num_classes]; no nn.Module, lest it be
            trained and saved (see `Teacher`).
        kind: 'soft' or 'hard'.
        alpha: weight of the teacher, 0 to 1.
        temperature: T of the soft distance.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        mixup: Mixing | None = None,
        *,
        teacher: Callable[[Tensor], Tensor],
        kind: str = "soft",
        alpha: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model, loss, mixup)
        assert not isinstance(teacher, nn.Module)
        self.teacher = teacher
        self.kind = kind
        self.alpha = alpha
        self.temperature = temperature

    def measure(
        self, image: Tensor, logits: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        advice = self.teacher(image)
        choice = advice.argmax(1)
        if self.kind == "hard":
            distance = F.cross_entropy(logits, choice)
        else:
            distance = soft_distance(logits, advice, self.temperature)
        loss = (1 - self.alpha) * self.loss(logits, target) + self.alpha * distance
        agreement = 100 * (logits.detach().argmax(1) == choice).float().mean()
        return loss, {"agreement": agreement}


def soft_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of logits [B, K], mean over images, times T^2.

    The factor keeps the gradient's size independent of T.
    """
    own, aim = (torch.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    return F.kl_div(own, aim, reduction="batchmean", log_target=True) * temperature**2
