"""Light and heavy attention against plain loops."""

import pytest
import torch
from torch import Tensor

from routedvit.layers import HeavyAttention, WindowAttention

DIM, HEADS, HEAD_DIM = 16, 2, 4


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query [d] over keys and values [n, d]."""
    return (k @ q / q.shape[-1] ** 0.5).softmax(0) @ v


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("height", "width", "window"), [(4, 4, 2), (5, 7, 3), (3, 3, 3)])
def test_every_token_attends_to_its_own_window(height, width, window, prefix):
    torch.manual_seed(0)
    layer = WindowAttention(
        DIM, num_heads=HEADS, head_dim=HEAD_DIM, window=window, num_prefix=prefix
    )
    x = torch.randn(2, prefix + height * width, DIM)
    q, k, v = layer.qkv(x).unflatten(2, (3, HEADS, HEAD_DIM)).unbind(2)
    expected = v.clone()  # of a prefix token: its own value
    cells = [(i // window, j // window) for i in range(height) for j in range(width)]
    for image in range(2):
        for i, cell in enumerate(cells):
            mates = [prefix + j for j, other in enumerate(cells) if other == cell]
            for head in range(HEADS):
                keys, values = k[image, mates, head], v[image, mates, head]
                query = q[image, prefix + i, head]
                expected[image, prefix + i, head] = attend(query, keys, values)
    torch.testing.assert_close(layer(x, (height, width)), layer.proj(expected.flatten(2)))


def heavy(**kwargs: object) -> HeavyAttention:
    torch.manual_seed(0)
    return HeavyAttention(DIM, num_heads=4, head_dim=HEAD_DIM, **kwargs)


@pytest.mark.parametrize("null_kv", [False, True])
@pytest.mark.parametrize("kv_gate", ["tokens", "values", "keys_values"])
@pytest.mark.parametrize("routes", [1, 2, 4])
def test_heavy_attention_is_a_loop_over_heads_and_their_route(routes, kv_gate, null_kv):
    layer = heavy(kv_routes=routes, kv_gate=kv_gate, null_kv=null_kv)
    queries, context = torch.randn(2, 5, DIM), torch.randn(2, routes, 3, DIM)
    gate = torch.rand(2, routes, 3)
    weight = layer.kv.weight.view(4, 2, HEAD_DIM, DIM)  # by head, whatever the routes
    bias = layer.kv.bias.view(4, 2, HEAD_DIM)
    q = layer.q(queries).unflatten(2, (4, HEAD_DIM))
    expected = torch.empty(2, 5, 4, HEAD_DIM)
    for image in range(2):
        for head in range(4):
            route = head // (4 // routes)
            rows, g = context[image, route], gate[image, route, :, None]
            rows = rows * g if kv_gate == "tokens" else rows
            k, v = (rows @ weight[head, i].T + bias[head, i] for i in (0, 1))
            v = v if kv_gate == "tokens" else v * g
            k = k * g if kv_gate == "keys_values" else k
            if null_kv:
                k = torch.cat([layer.null_kv[0, head : head + 1], k])
                v = torch.cat([layer.null_kv[1, head : head + 1], v])
            for i in range(5):
                expected[image, i, head] = attend(q[image, i, head], k, v)
    torch.testing.assert_close(layer(queries, context, gate), layer.proj(expected.flatten(2)))


def test_all_routes_stay_in_the_type_of_autocast():
    """An fp32 bias added to a bf16 product would make fp32 keys, and scores, of all of them."""
    layer = heavy(kv_routes=2)
    with torch.autocast("cpu", torch.bfloat16):
        k, v = layer._keys_values(torch.randn(2, 2, 3, DIM))
    assert k.dtype == v.dtype == torch.bfloat16


def test_rotary_positions_make_scores_depend_on_distance_only():
    layer = heavy()
    angle = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.3]).repeat_interleave(2)
    rope = torch.cat([angle.sin(), angle.cos()], -1)  # sin | cos, interleaved pairs, as timm's
    queries, context, gate = torch.randn(1, 2, DIM), torch.randn(1, 1, 3, DIM), torch.ones(1, 1, 3)
    q_at, k_at = torch.tensor([[1, 4]]), torch.tensor([[[0, 2, 5]]])
    here = layer(queries, context, gate, rope[q_at], rope[k_at])
    moved = layer(queries, context, gate, rope[q_at + 3], rope[k_at + 3])
    torch.testing.assert_close(here, moved)
    assert not torch.allclose(here, layer(queries, context, gate, rope[q_at + 1], rope[k_at]))


def test_dropout_is_off_in_eval():
    layer = heavy(attn_drop=0.5).eval()
    arguments = torch.randn(1, 4, DIM), torch.randn(1, 1, 6, DIM), torch.ones(1, 1, 6)
    assert torch.equal(layer(*arguments), layer(*arguments))
    layer.train()
    assert not torch.equal(layer(*arguments), layer(*arguments))


@pytest.mark.parametrize("arguments", [{"kv_routes": 3}, {"kv_gate": "both"}])
def test_impossible_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        heavy(**arguments)
