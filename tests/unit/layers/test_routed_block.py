"""A routed block: light for all, heavy for the routed, dense at capacity 1."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from routedvit.layers import RoutedBlock

DIM, HEADS, GRID = 32, 4, (5, 6)
N = GRID[0] * GRID[1]


def block(**kwargs: object) -> RoutedBlock:
    torch.manual_seed(0)
    made = RoutedBlock(DIM, HEADS, light_window=3, **kwargs).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)  # large enough to see every path
        elif "norm" in name:
            nn.init.normal_(parameter, mean=0.5)  # large enough to tell the norms apart
    return made


def tokens(prefix: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, prefix + N, DIM, generator=torch.Generator().manual_seed(1))


def routed_tokens(router: nn.Module, x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """indices and gates [B, k] of the first route, counted in tokens."""
    indices, gates, _ = router.decide(router(x, prefix))
    return indices[:, 0] + prefix, gates[:, 0]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("separate", [False, True])
def test_attention_is_a_loop_over_images_and_routed_tokens(prefix, separate):
    layer = block(num_prefix=prefix, separate_norms=separate, init_values=0.5).attn
    x = tokens(prefix)
    y = layer.norm(x)
    z = layer.norm_heavy(x) if separate else y
    q_index, q_gate = routed_tokens(layer.q_router, y, prefix)
    kv_index, kv_gate = routed_tokens(layer.kv_router, y, prefix)
    expected = layer.light(y, GRID)
    for image in range(len(x)):
        keys = [*range(prefix), *kv_index[image].tolist()]
        gates = torch.cat([torch.ones(prefix), kv_gate[image]])
        queries = dict.fromkeys(range(prefix), 1.0)
        queries.update(zip(q_index[image].tolist(), q_gate[image].tolist(), strict=True))
        for i, gate in queries.items():
            context = z[image, keys].view(1, 1, len(keys), DIM)
            out = layer.heavy(z[image, i].view(1, 1, DIM), context, gates.view(1, 1, -1))
            expected[image, i] = expected[image, i] + gate * out.flatten()
    torch.testing.assert_close(layer(x, GRID), x + 0.5 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlp_layer", ["mlp", "swiglu"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("separate", [False, True])
def test_feedforward_is_a_loop_over_images_and_routed_tokens(prefix, mlp_layer, separate):
    layer = block(num_prefix=prefix, mlp_layer=mlp_layer, separate_norms=separate).mlp
    x = tokens(prefix)
    y = layer.norm(x)
    z = layer.norm_heavy(x) if separate else y
    index, gate = routed_tokens(layer.router, y, prefix)
    expected = layer.light(y)
    for image in range(len(x)):
        for i in range(prefix):
            expected[image, i] = expected[image, i] + layer.heavy(z[image, i])
        for i, g in zip(index[image].tolist(), gate[image], strict=True):
            expected[image, i] = expected[image, i] + g * layer.heavy(z[image, i])
    torch.testing.assert_close(layer(x), x + expected, rtol=1e-4, atol=1e-5)


def dense_twin(routed: RoutedBlock, **kwargs: object) -> Block:
    """timm's block with the weights of the heavy path."""
    twin = Block(DIM, HEADS, qkv_bias=True, **kwargs).eval()
    attn, mlp = routed.attn, routed.mlp
    with torch.no_grad():
        for kind in ("weight", "bias"):
            q, kv = getattr(attn.heavy.q, kind), getattr(attn.heavy.kv, kind)
            k, v = kv.view(HEADS, 2, DIM // HEADS, -1).unbind(1)  # ordered by head
            parts = (q, k.reshape(q.shape), v.reshape(q.shape))
            getattr(twin.attn.qkv, kind).copy_(torch.cat(parts))
    pairs = [(twin.attn.proj, attn.heavy.proj), (twin.norm1, attn.norm), (twin.norm2, mlp.norm)]
    pairs += [(twin.mlp.fc1, mlp.heavy.fc1), (twin.mlp.fc2, mlp.heavy.fc2)]
    for dense, ours in pairs:
        dense.load_state_dict(ours.state_dict())
    return twin


FULL = {"q_capacity": 1, "kv_capacity": 1, "ffn_capacity": 1}


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kwargs", [FULL, {"router": "all_heavy"}])
def test_capacity_one_without_light_path_is_the_dense_block(kwargs, prefix):
    routed = block(num_prefix=prefix, light_heads=0, light_mlp_ratio=0, **kwargs)
    x = tokens(prefix)
    torch.testing.assert_close(routed(x, GRID), dense_twin(routed)(x), rtol=1e-5, atol=1e-5)


def test_capacity_one_is_the_all_heavy_block():
    routed, heavy = block(**FULL), block(router="all_heavy")
    heavy.load_state_dict({k: v for k, v in routed.state_dict().items() if "router" not in k})
    x = tokens()
    torch.testing.assert_close(routed(x, GRID), heavy(x, GRID))


def test_all_light_block_is_the_light_path_alone():
    light = block(router="all_light")
    x = tokens()
    x1 = x + light.attn.light(light.attn.norm(x), GRID)
    torch.testing.assert_close(light(x, GRID), x1 + light.mlp.light(light.mlp.norm(x1)))


def test_unselected_tokens_get_the_null_token():
    plain, with_null = block().attn, block(null_token=True).attn
    with torch.no_grad():
        with_null.null_token.copy_(torch.arange(DIM))
    x = tokens()
    selected, _ = routed_tokens(plain.q_router, plain.norm(x), 0)
    expected = plain(x, GRID) + torch.arange(DIM)
    for image, rows in enumerate(selected):
        expected[image, rows] -= torch.arange(DIM)
    torch.testing.assert_close(with_null(x, GRID), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heavy_window", [False, True])
def test_heavy_attention_is_global_unless_told_to_stay_in_the_window(heavy_window):
    layer = block(q_capacity=0.5, kv_capacity=0.5, heavy_window=heavy_window).attn
    x = torch.randn(1, 36, DIM, requires_grad=True)  # 6 x 6 tokens, windows of 3 x 3
    first_window = [row * 6 + column for row in range(3) for column in range(3)]
    layer(x, (6, 6))[:, first_window].sum().backward()
    outside = torch.ones(36, dtype=torch.bool)
    outside[first_window] = False
    assert bool((x.grad[0, outside] != 0).any()) is not heavy_window


@pytest.mark.parametrize("kv_routes", [1, 2])
def test_batched_is_per_image_and_follows_the_batch_order(kv_routes):
    routed = block(num_prefix=1, kv_routes=kv_routes)
    x = tokens(1, 4)
    out = routed(x, GRID)
    torch.testing.assert_close(out, torch.cat([routed(image[None], GRID) for image in x]))
    torch.testing.assert_close(routed(x.flip(0), GRID), out.flip(0))


def test_drop_path_drops_the_whole_sublayer_of_an_image():
    routed = block(drop_path=0.5).train()
    x = tokens(batch=64)
    out = routed.attn(x, GRID)
    dropped = (out == x).flatten(1).all(1)
    assert 0 < dropped.sum() < 64
    assert not (out == x).flatten(1).any(1)[~dropped].all()


@pytest.mark.parametrize(
    "kwargs",
    [{"mlp_layer": "conv"}, {"router": "oracle"}, {"scale_attn_norm": True}, {"kv_routes": 3}],
)
def test_impossible_arguments_are_named(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        RoutedBlock(DIM, HEADS, **kwargs)
    with pytest.raises(ValueError, match="num_heads=5"):
        RoutedBlock(DIM, 5)
