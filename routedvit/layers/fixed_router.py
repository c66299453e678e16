"""Routers without parameters: the controls that every routing result is to be compared with.

A learned router that does not beat these has learned nothing (in CoLT5 the static one costs 2
points). They share the interface of `Router`, and `build_router` makes either.
"""

from fractions import Fraction

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.jit import Final

from routedvit.layers.router import Decision, Router, as_ratio
from routedvit.ops import select

__all__ = ["ROUTERS", "FixedRouter", "build_router"]

ROUTERS = ("learned", "random", "static", "all_heavy", "all_light")


class FixedRouter(nn.Module):
    """Routing that does not look at the image.

    Args:
        kind: 'random' draws new tokens in every training step and keeps to fixed ones in eval
            mode; 'static' takes the first token of k equal blocks (the paper's control);
            'all_heavy' takes every token, 'all_light' none.
        capacity: share of the tokens, for 'random' and 'static'.
        num_routes: as in `Router`.
    """

    kind: Final[str]
    num_routes: Final[int]

    def __init__(
        self, kind: str, capacity: float | str | Fraction = 0.25, *, num_routes: int = 1
    ) -> None:
        super().__init__()
        self.kind = kind
        self.num_routes = num_routes
        self.decision = Decision()
        self.set_capacity(as_ratio(capacity))

    @torch.jit.ignore
    def set_capacity(self, ratio: Fraction) -> None:
        """Change the share of selected tokens; 'all_heavy' and 'all_light' keep theirs."""
        fixed = {"all_heavy": Fraction(1), "all_light": Fraction(0)}
        ratio = fixed.get(self.kind, ratio)
        self.numerator, self.denominator = ratio.numerator, ratio.denominator

    @torch.jit.ignore
    def extra_repr(self) -> str:
        """As `Router.extra_repr`."""
        return f"{self.kind}, capacity={Fraction(self.numerator, self.denominator)}"

    def num_selected(self, num_tokens: int) -> int:
        """As `Router.num_selected`."""
        return (num_tokens * self.numerator + self.denominator - 1) // self.denominator

    def takes_all(self) -> bool:
        """As `Router.takes_all`."""
        return self.numerator == self.denominator

    def forward(self, x: Tensor, num_prefix: int = 0) -> Tensor:
        """As `Router.forward`."""
        num_tokens = x.shape[1] - num_prefix
        k = self.num_selected(num_tokens)
        return fixed_scores(x, num_tokens, self.num_routes, k, self.kind == "random", self.training)

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Router.decide`; the gates are 1."""
        indices = select(logits, self.num_selected(logits.shape[-1]))
        gates = torch.ones_like(indices, dtype=torch.float32)
        return self.decision(indices, gates, logits)


@register_notrace_function
def fixed_scores(
    x: Tensor, num_tokens: int, num_routes: int, k: int, random: bool, training: bool
) -> Tensor:
    """Scores [B, R, N] for images x [B, ...]; a `FixedRouter` takes the k largest."""
    batch = x.shape[0]
    if random and training:
        return torch.rand(batch, num_routes, num_tokens, device=x.device)
    position = torch.arange(num_tokens, device=x.device)
    if random:
        # a hash of the position: irregular, and the same in every run and on every device
        score = ((position + 1) * 7919 % 10007).float()
    else:
        # block i of k begins at ceil(i * N / k): there, and only there, floor(position * k / N)
        # has just risen
        score = (position * k % num_tokens < k).float()
    return score.expand(batch, num_routes, num_tokens)


def build_router(
    kind: str, dim: int, capacity: float | str | Fraction, *, num_routes: int = 1, **kwargs: object
) -> Router | FixedRouter:
    """A `Router` (kind 'learned', keyword arguments are its own) or a `FixedRouter`.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ROUTERS:
        raise ValueError(f"router={kind!r} is unknown; choose one of {', '.join(ROUTERS)}")
    if kind == "learned":
        return Router(dim, capacity, num_routes=num_routes, **kwargs)  # type: ignore[arg-type]
    return FixedRouter(kind, capacity, num_routes=num_routes)
