"""Norm and linear layer in one: the norm's weights are multiplied into those of the linear layer.

    linear(norm(x)) = (W diag(g)) x_hat + W b + c,   x_hat = (x - mean(x)) / std(x), or x / rms(x)

Normalised tokens are then neither written nor differentiated, which saves passes over [..., D] in
both directions, and where x needs no gradient, as patches of an image do not, the gradient of g and
b costs no product of its own: that of W holds it. For the first reader of a token whose norm nobody
else reads.

Each owns all of its parameters, so that ZeRO-3, which gathers them module by module, finds them.
None is an nn.Linear: an adapter (LoRA) put around one would see tokens that are not normalised.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routedvit.ops import rms_norm_linear

__all__ = ["LayerNormLinear", "RmsNormLinear"]


class LayerNormLinear(nn.Module):
    """LayerNorm, then a linear layer with bias.

    Args:
        in_features, out_features: widths D and E.
        eps: added to the variance.
    """

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        linear = nn.Linear(in_features, out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.norm_weight = nn.Parameter(torch.ones(in_features))
        self.norm_bias = nn.Parameter(torch.zeros(in_features))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(cast(nn.Linear, self))
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        x = F.layer_norm(x, (self.in_features,), eps=self.eps)
        bias = self.bias + self.weight @ self.norm_bias
        return F.linear(x, self.weight * self.norm_weight, bias)


class RmsNormLinear(nn.Module):
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467), then a linear layer: the norm divides its
    output, which is narrower than x where this pays.

    Args:
        norm, linear: of nn.RMSNorm's kind with a weight [D], and [D] -> [E]; their parameters
            become this module's.
    """

    def __init__(self, norm: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.norm_weight = cast(nn.Parameter, norm.weight)
        self.eps = cast(float, norm.eps)

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(cast(nn.Linear, self))
        nn.init.ones_(self.norm_weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        return rms_norm_linear(x, self.norm_weight, self.weight, self.bias, self.eps)
