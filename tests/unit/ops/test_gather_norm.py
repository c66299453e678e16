"""Gather and norm at once: the reference is one after the other."""

import pytest
import torch
import torch.nn.functional as F

from routedvit.ops import gather_norm
from tests.unit.ops.comparing import draw


@pytest.mark.parametrize("rms", [False, True])
def test_rows_are_gathered_then_normalised(rms):
    x, weight, bias = draw(2, 7, 6), draw(6), None if rms else draw(6, seed=1)
    index = torch.tensor([[0, 3], [5, 6]])
    out = gather_norm(x, index, weight, bias, 1e-5, rms=rms)
    for image in range(2):
        rows = x[image, index[image]]
        if rms:
            expected = rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        else:
            expected = F.layer_norm(rows, (6,), weight, bias, 1e-5)
        torch.testing.assert_close(out[image], expected)


def test_rmsnorm_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias must be None"):
        gather_norm(draw(1, 3, 4), torch.zeros(1, 1).long(), draw(4), draw(4), rms=True)
