"""Scores are fp32 dot products of the patches, whatever autocast and the weights say."""

import pytest
import torch
from torch import Tensor

from routedvit.ops import router_logits
from tests.unit.ops.comparing import draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("prefix", "routes"), [(0, 1), (3, 2)])
def test_a_score_is_a_scaled_product_of_a_patch_and_a_route(prefix, routes, dtype):
    x, weight = draw(2, 7, 6).to(dtype), draw(routes, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, weight, 0.5, prefix)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.shape == (2, routes, 7 - prefix)
    for r in range(routes):
        for n in range(7 - prefix):
            expected = 0.5 * (x[:, prefix + n].double() @ weight[r].double())
            torch.testing.assert_close(logits[:, r, n].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_no_copy_and_has_the_gradients_of_full_precision(dtype):
    x, weight = draw(2, 7, 6).to(dtype).requires_grad_(), draw(2, 6).to(dtype).requires_grad_()
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = router_logits(x, weight, 0.5, 1)
    assert [tensor.dtype for tensor in kept if tensor.numel() == x.numel()] == [dtype]
    grad = draw(*logits.shape)
    logits.backward(grad)
    exact = [tensor.detach().float().requires_grad_() for tensor in (x, weight)]
    router_logits(*exact, 0.5, 1).backward(grad)
    for low, full in zip((x, weight), exact, strict=True):
        assert torch.equal(low.grad, full.grad.to(dtype))
