"""The learned router: which tokens of an image go heavy.

Every patch token is scored, k of them win, and the winners' gates are the exact soft top-k of the
scores (`routedvit.ops.route`). Scores are fp32 dot products of the *normalised* token with a
learned vector of unit variance, times 1/sqrt(D), so they start with a standard deviation of 1 at
eps = 1. That is where routing learns: 94 % of the selected tokens pass a gradient and the mean gate
of a winner is about 0.5. Unscaled logits at D = 768 have a standard deviation of 27; then 0.3 %
pass a gradient, all gates are 1, and the router is dead.

Gates are the soft values, as in the paper. The weights of the heavy branch make up for the
attenuation; straight-through gates avoid it at the price of a gradient that contradicts the forward
pass. (On 4,000 MNIST digits, 5 epochs, the test model: soft 86.7 %, straight-through 84.4 %.)

Capacity is an integer ratio, k = ceil(n * num / den): static shapes, any image size, arithmetic
that can be traced.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Rational, Real
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.jit import Final

from routedvit.ops import coordinate_descent, route, route_all, router_logits, select
from routedvit.ops.backend import transformed
from routedvit.ops.soft_topk import SOLVERS

__all__ = ["Router", "as_ratio", "decide_together", "keep_in_graph"]

register_notrace_function(route)
register_notrace_function(router_logits)
register_notrace_function(select)


def as_ratio(capacity: float | str | Fraction, name: str = "capacity") -> Fraction:
    """A capacity in (0, 1] as an exact ratio: 0.25, '1/4' or Fraction(1, 4).

    Raises:
        TypeError: neither a number nor such a string.
        ValueError: outside (0, 1].
    """
    if isinstance(capacity, bool) or not isinstance(capacity, Real | str):
        raise TypeError(f"{name}={capacity!r} must be a number in (0, 1] or a ratio such as '1/4'")
    try:
        ratio = Fraction(capacity if isinstance(capacity, Rational | str) else float(capacity))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{name}={capacity!r} is not a ratio; write 0.25 or '1/4'") from None
    if not isinstance(capacity, Rational | str):
        # 0.1 means 1/10, not its binary neighbour; the smallest share is one token anyway
        smallest = Fraction(1, 4096)
        ratio = smallest if 0 < ratio < smallest else ratio.limit_denominator(4096)
    if not 0 < ratio <= 1:
        raise ValueError(
            f"{name}={capacity!r} must lie in (0, 1]: the share of tokens that go heavy"
        )
    return ratio


@register_notrace_function
def straight_through(gates: Tensor) -> Tensor:
    """Value 1, gradient of the gates."""
    return gates + (1 - gates).detach()


@register_notrace_function
def take_all(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Every index and gates of 1, whose gradient is 0."""
    indices = torch.arange(logits.shape[-1], device=logits.device)
    return indices.expand(logits.shape).contiguous(), torch.ones_like(logits) + 0 * logits


class _Keep(torch.autograd.Function):
    """The first input as it is; the second gets a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = gates.shape, gates.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_zeros(ctx.shape, dtype=ctx.dtype)


@register_notrace_function
def keep_in_graph(x: Tensor, gates: Tensor) -> Tensor:
    """x, with gates that nothing multiplies: their router gets a gradient of 0, not none.

    Under ZeRO-3 a parameter without a gradient would be given that of an earlier step.
    """
    if torch.jit.is_scripting():
        return x
    if transformed():  # which gives zeros itself
        return x
    return _Keep.apply(x, gates)


@register_notrace_function
def no_logits(x: Tensor, weight: Tensor, num_prefix: int) -> Tensor:
    """Zeros [B, R, N] in place of scores that decide nothing; the weight gets a gradient of 0."""
    shape = (x.shape[0], weight.shape[0], x.shape[1] - num_prefix)
    return keep_in_graph(torch.zeros(shape, device=x.device), weight)


class Decision(nn.Module):
    """What a router decided, passed on as it is: the place for hooks that want to look at it."""

    def forward(
        self, indices: Tensor, gates: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """indices and gates [B, R, k], logits [B, R, N]."""
        return indices, gates, logits


class Router(nn.Module):
    """Learned routes over the tokens of an image.

    Args:
        dim: token width D.
        capacity: share of the tokens selected, see `as_ratio`.
        num_routes: routes R with a vector each (several kv routes).
        scale: factor on the dot products; None is 1/sqrt(D).
        eps: temperature of the soft top-k.
        fetch_ratio: the gates of all tokens sum to fetch_ratio * k (9/8 in the paper).
        straight_through: gates of value 1 with the gradient of the soft ones.
        cosine: score the cosine between token and vector in place of their dot product.
        solver: 'exact', or 'coordinate_descent' as in the package colt5-attention, which also
            selects by gate, not by logit.
        eps_init, eps_decay, num_iterations: of coordinate descent, see
            `routedvit.ops.coordinate_descent`.
    """

    num_routes: Final[int]
    scale: Final[float]
    eps: Final[float]
    fetch_ratio: Final[float]
    straight_through: Final[bool]
    cosine: Final[bool]
    exact: Final[bool]
    eps_init: Final[float]
    eps_decay: Final[float]
    num_iterations: Final[int]

    def __init__(
        self,
        dim: int,
        capacity: float | str | Fraction = 0.25,
        *,
        num_routes: int = 1,
        scale: float | None = None,
        eps: float = 1.0,
        fetch_ratio: float = 1.125,
        straight_through: bool = False,
        cosine: bool = False,
        solver: str = "exact",
        eps_init: float = 4.0,
        eps_decay: float = 0.7,
        num_iterations: int = 20,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if solver not in SOLVERS:
            raise ValueError(
                f"solver={solver!r} is unknown; choose {' or '.join(map(repr, SOLVERS))}"
            )
        if not (eps > 0 and 1 <= fetch_ratio < math.inf):
            raise ValueError(
                f"eps={eps} must be positive and fetch_ratio={fetch_ratio} a number of at least 1"
            )
        if num_iterations < 1:
            raise ValueError(f"num_iterations={num_iterations} must be at least 1")
        self.num_routes = num_routes
        self.scale = dim**-0.5 if scale is None else scale
        self.eps = eps
        self.fetch_ratio = fetch_ratio
        self.straight_through = straight_through
        self.cosine = cosine
        self.exact = solver == "exact"
        self.eps_init, self.eps_decay = eps_init, eps_decay
        self.num_iterations = num_iterations
        self.set_capacity(as_ratio(capacity))
        self.weight = nn.Parameter(torch.empty(num_routes, dim, device=device, dtype=dtype))
        self.decision = Decision()
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.normal_(self.weight)

    @torch.jit.ignore
    def extra_repr(self) -> str:
        """For print(model): the present capacity among it."""
        share = Fraction(self.numerator, self.denominator)
        capacity = f"{self.fixed_number} tokens" if self.fixed_number else str(share)
        return f"{self.weight.shape[1]}, routes={self.num_routes}, capacity={capacity}"

    @torch.jit.ignore
    def set_capacity(self, ratio: Fraction) -> None:
        """Change the share of selected tokens."""
        self.numerator, self.denominator = ratio.numerator, ratio.denominator
        self.fixed_number = 0

    @torch.jit.ignore
    def set_number(self, number: int) -> None:
        """Select this number of tokens instead of a share, or all where there are fewer."""
        self.fixed_number = number

    def num_selected(self, num_tokens: int) -> int:
        """k = ceil(capacity * num_tokens), in integers."""
        if self.fixed_number > 0:
            return min(self.fixed_number, num_tokens)
        return (num_tokens * self.numerator + self.denominator - 1) // self.denominator

    def takes_all(self) -> bool:
        """Whether every token goes heavy, at any size."""
        return self.numerator == self.denominator and self.fixed_number == 0

    def forward(self, x: Tensor, num_prefix: int = 0) -> Tensor:
        """Score the patches of x [B, P + N, D], whose P prefix tokens do not compete.

        Returns:
            logits [B, R, N] in fp32, for `decide` or, of several routers at once,
            `decide_together`. Zeros where all tokens are taken and nobody watches `decision`.
        """
        if self.takes_all():  # all gates are 1, and no gradient reaches x
            if not torch.jit.is_scripting():  # noqa: SIM102 -- TorchScript wants it alone
                if not self._watched():
                    return no_logits(x, self.weight, num_prefix)
            x = x.detach()
        if self.cosine:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            x, vectors = (
                F.normalize(x.to(dtype), dim=-1),
                F.normalize(self.weight.to(dtype), dim=-1),
            )
            return router_logits(x, vectors, self.scale, num_prefix)
        return router_logits(x, self.weight, self.scale, num_prefix)

    @torch.jit.ignore
    def _watched(self) -> bool:
        """Whether anybody will look at the scores."""
        return len(self.decision._forward_hooks) > 0

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select and weigh.

        Returns:
            indices [B, R, k] ascending, 0 = first patch; gates [B, R, k] in fp32; the logits.
        """
        k = self.num_selected(logits.shape[-1])
        if self.takes_all():
            indices, gates = take_all(logits)
        elif self.exact:
            indices, gates = route(logits, k, self.fetch_ratio, self.eps)
        else:
            indices, gates = self._pick(self._descend(logits, [k] * self.num_routes), k)
        if self.straight_through:
            gates = straight_through(gates)
        return self.decision(indices, gates, logits)

    def _descend(self, logits: Tensor, counts: list[int]) -> Tensor:
        """Gates [B, R, N] by coordinate descent for routes that select `counts` tokens."""
        return descend(
            logits,
            counts,
            self.fetch_ratio,
            self.eps,
            self.eps_init,
            self.eps_decay,
            self.num_iterations,
        )

    def _pick(self, gates: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Indices [..., k] of the largest gates [..., n], ascending, and these gates."""
        indices = select(gates, k)
        return indices, gates.gather(-1, indices)


def decide_together(routers: Sequence[Router], logits: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """`Router.decide` of each router on its own logits, by one operator: one launch on a GPU.

    The routers must be learned and alike in all but capacity and number of routes.
    """
    scores = torch.cat(logits, 1)
    counts = [r.num_selected(scores.shape[-1]) for r in routers for _ in range(r.num_routes)]
    if routers[0].exact:
        routes = route_all(scores, counts, routers[0].fetch_ratio, routers[0].eps)
    else:
        gates = routers[0]._descend(scores, counts)
        routes = [routers[0]._pick(own, k) for own, k in zip(gates.unbind(1), counts, strict=True)]
    decisions, start = [], 0
    for router, own_logits in zip(routers, logits, strict=True):
        own = routes[start : start + router.num_routes]
        indices, own_gates = (torch.stack(part, 1) for part in zip(*own, strict=True))
        if router.straight_through:
            own_gates = straight_through(own_gates)
        decisions.append(router.decision(indices, own_gates, own_logits))
        start += router.num_routes
    return decisions


@register_notrace_function
def descend(
    logits: Tensor,
    counts: list[int],
    fetch_ratio: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
    num_iterations: int,
) -> Tensor:
    """Gates of logits [B, R, N] by coordinate descent, of route r summing to counts[r] times
    fetch_ratio. Where all tokens are selected all gates are 1, and no gradient passes.
    """
    n = logits.shape[-1]
    targets = [torch.full_like(logits[:, :1, :1], min(k * fetch_ratio, n)) for k in counts]
    gates = coordinate_descent(
        logits,
        torch.cat(targets, 1),
        eps=eps,
        eps_init=eps_init,
        eps_decay=eps_decay,
        num_iterations=num_iterations,
    )
    if max(counts) < n:
        return gates
    ones = torch.ones_like(logits[:, :1]) + 0 * logits[:, :1]
    routes = [ones if k >= n else gates[:, r : r + 1] for r, k in enumerate(counts)]
    return torch.cat(routes, 1)
