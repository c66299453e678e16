"""`ConditionalRoutedViT` against the installed `colt5-attention`: weights, outputs, gradients.

Seeds are fixed. With unscaled logits many gates saturate at exactly 1 and the choice among them is
`topk`'s, the same on both sides, so equality is to be expected at any seed.
"""

import pickle
from typing import Any

import colt5_attention
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import routedvit
from routedvit.layers import ConditionalRoutedFeedForward, ConditionalRoutedImageAttention
from routedvit.ops import set_backend

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BASE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "num_classes": 7,
    "dim": 32,
    "depth": 2,
    "attn_num_heavy_tokens_q": 5,
    "attn_num_heavy_tokens_kv": 6,
    "attn_heavy_dim_head": 8,
    "attn_heavy_heads": 4,
    "attn_light_dim_head": 4,
    "attn_light_heads": 2,
    "attn_light_window_size": 4,
    "ff_num_heavy_tokens": 19,
    "ff_heavy_mult": 4,
    "ff_light_mult": 0.5,
}
GRID: dict[str, dict[str, Any]] = {
    "defaults": {},
    "soft gates": {"router_straight_through": False},
    "two kv routes": {"attn_num_routed_kv": 2},
    "two kv routes, soft gates": {"attn_num_routed_kv": 2, "router_straight_through": False},
    "four kv routes": {"attn_num_routed_kv": 4, "router_straight_through": False},
    "no flash attention": {"flash_attn": False},
    "small window": {"attn_light_window_size": 2, "attn_num_heavy_tokens_q": 1,
                     "attn_num_heavy_tokens_kv": 2},
    "whole image in one window": {"attn_light_window_size": 8},
    "rectangular image": {"image_size": (16, 48)},
    "rectangular patches": {"image_size": (32, 64), "patch_size": (4, 8)},
    "one heavy token": {"attn_num_heavy_tokens_q": 1, "attn_num_heavy_tokens_kv": 1,
                        "ff_num_heavy_tokens": 1},
    "almost all tokens heavy": {"attn_num_heavy_tokens_q": 15, "attn_num_heavy_tokens_kv": 15,
                                "ff_num_heavy_tokens": 63, "router_straight_through": False},
    "more keys than tokens": {"attn_num_heavy_tokens_kv": 20, "attn_num_routed_kv": 2},
    "every token through the feed-forward": {"ff_num_heavy_tokens": 64},
    "sharp routers": {"default_coor_descent_eps": 0.05, "router_straight_through": False},
    "soft routers": {"default_coor_descent_eps": 8.0, "router_straight_through": False},
    "eps of router_kwargs wins": {"router_kwargs": {"eps": 2.0}, "router_straight_through": False},
    "all router_kwargs": {"router_straight_through": False, "router_kwargs": {
        "n_iters": 50, "fetch_k_ratio": 1.0, "eps": 0.7, "eps_init": 3.0, "eps_decay": 0.8}},
    "no epsilon scaling": {"router_straight_through": False,
                           "router_kwargs": {"eps_init": None, "eps_decay": 1.0}},
    "cosine routing": {"router_straight_through": False, "router_kwargs": {
        "cosine_sim_routing": True, "cosine_sim_scale": 5}},
    "Triton asked for on a CPU": {"router_use_triton": True},
    "Triton in router_kwargs": {"router_kwargs": {"use_triton": True,
                                                  "triton_checkpoint_segments": 2}},
    "wide": {"dim": 128, "depth": 1},
    "one channel, odd widths": {"channels": 1, "dim": 20, "ff_heavy_mult": 1.7,
                                "attn_heavy_dim_head": 6},
}  # fmt: skip


def pair(**kwargs: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """Theirs, ours with its weights, and images for both."""
    torch.manual_seed(0)
    arguments = {**BASE, **kwargs}
    theirs = colt5_attention.ConditionalRoutedViT(**arguments)
    ours = routedvit.ConditionalRoutedViT(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    size = arguments["image_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    return theirs, ours, torch.randn(3, arguments.get("channels", 3), height, width)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by the names in the state dict; parameters that are not used have none."""
    loss.backward()
    parameters = model.state_dict(keep_vars=True)
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
    for name in ours.keys() - theirs.keys():  # they leave out what they skip; ours is in the graph
        assert not ours[name].any(), name


@pytest.mark.parametrize("name", GRID)
def test_outputs_and_gradients_are_theirs(name: str) -> None:
    theirs, ours, images = pair(**GRID[name])
    expected, got = theirs(images), ours(images)
    assert (got - expected).abs().max() < 1e-5
    weight = torch.randn_like(expected)
    assert_same_gradients(
        gradients(ours, (got * weight).sum()), gradients(theirs, (expected * weight).sum())
    )


def test_it_trains_in_autocast_where_theirs_cannot() -> None:
    _, ours, images = pair()
    expected = ours(images)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(images)
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    assert (got - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["defaults", "two kv routes", "one channel, odd widths"])
def test_our_state_dict_is_theirs(name: str) -> None:
    theirs, ours, _ = pair(**GRID[name])
    saved, expected = ours.state_dict(), theirs.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    fresh = colt5_attention.ConditionalRoutedViT(**{**BASE, **GRID[name]})
    fresh.load_state_dict(saved, strict=True)


def test_saved_tensors_are_the_parameters_themselves() -> None:
    """In-place writes to a state dict (weight averaging, distributed checkpoints) must arrive."""
    _, ours, _ = pair(attn_num_routed_kv=2)
    addresses = {parameter.data_ptr() for parameter in ours.parameters()}
    assert {tensor.data_ptr() for tensor in ours.state_dict().values()} == addresses


def test_images_of_another_size_than_the_constructor_was_told() -> None:
    theirs, ours, _ = pair()
    images = torch.randn(2, 3, 48, 16)
    assert (ours(images) - theirs(images)).abs().max() < 1e-5


def test_one_training_step_moves_both_the_same_way() -> None:
    theirs, ours, images = pair(attn_num_routed_kv=2, router_straight_through=False)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(images).square().mean().backward()
        optimizer.step()
    after = ours.state_dict()
    for key, expected in theirs.state_dict().items():
        torch.testing.assert_close(after[key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("routes", [1, 2])
@pytest.mark.parametrize("number", [16, 40])
def test_windows_with_no_more_tokens_than_go_heavy_work(number: int, routes: int) -> None:
    """They crash there; their own two paths, run by hand on a whole window, say what it must be."""
    arguments = {"num_heavy_tokens_q": number, "num_heavy_tokens_kv": number, "light_heads": 2,
                 "num_routed_kv": routes, "light_window_size": 4, "heavy_heads": 4}  # fmt: skip
    theirs = colt5_attention.ConditionalRoutedImageAttention(32, **arguments)
    ours = ConditionalRoutedImageAttention(32, **arguments)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 4, 32)
    with pytest.raises(Exception):  # noqa: B017, PT011  whichever they fail with
        theirs(x)
    window = x.flatten(1, 2)
    context = window.unsqueeze(1).expand(-1, routes, -1, -1)
    expected = theirs.light_attn(window) + theirs.heavy_attn(window, context=context)
    torch.testing.assert_close(ours(x).flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"channel_first": True},
        {"use_null_q_tokens": False},
        {"multiply_keys_by_score": True, "router_straight_through": False},
        {"multiply_queries_by_score": True, "router_straight_through": False},
    ],
)
def test_attention_part_takes_their_arguments(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    arguments = {"num_heavy_tokens_q": 4, "num_heavy_tokens_kv": 5, "num_routed_kv": 2,
                 "light_heads": 2, "light_window_size": 4, "heavy_heads": 4,
                 "router_kwargs": {"eps": 1.0}, **kwargs}  # fmt: skip
    theirs = colt5_attention.ConditionalRoutedImageAttention(24, **arguments)
    ours = ConditionalRoutedImageAttention(24, **arguments)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 24, 8, 12) if "channel_first" in kwargs else torch.randn(2, 8, 12, 24)
    expected, got = theirs(x), ours(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(
        gradients(ours, got.square().sum()), gradients(theirs, expected.square().sum())
    )


def test_with_one_kv_route_no_image_sees_another() -> None:
    """With several they mix in colt5-attention, which the parity above includes."""
    _, ours, images = pair()
    alone = torch.cat([ours(image[None]) for image in images])
    torch.testing.assert_close(ours(images), alone, rtol=1e-5, atol=1e-6)


def test_a_copy_saves_and_loads_like_the_original() -> None:
    _, ours, images = pair()
    copy = pickle.loads(pickle.dumps(ours))
    copy.load_state_dict(ours.state_dict())
    assert copy.state_dict().keys() == ours.state_dict().keys()
    assert torch.equal(copy(images), ours(images))


def test_feed_forward_part_has_their_defaults() -> None:
    torch.manual_seed(0)
    theirs = colt5_attention.ConditionalRoutedFeedForward(48, num_heavy_tokens=9)
    ours = ConditionalRoutedFeedForward(48, num_heavy_tokens=9)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 40, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 30}, "image_size=.*multiple of patch_size"),
        ({"attn_light_window_size": 3}, "attn_light_window_size=3 must divide .* 8 x 8"),
        ({"attn_light_window_size": 16}, "attn_light_window_size=16 must divide"),
        ({"attn_num_routed_kv": 3}, "attn_heavy_heads=4 .*attn_num_routed_kv=3"),
        ({"dim": 30}, "dim=30"),
        ({"ff_num_heavy_tokens": 0}, "num_heavy_tokens=0 must be at least 1"),
        ({"router_kwargs": {"eps": 0}}, "eps=0 must be positive"),
        ({"patch_size": (4, 0)}, "patch_size=0 must be at least 1"),
        ({"attn_light_window_size": 0}, "attn_light_window_size=0 must be at least 1"),
        ({"attn_light_heads": 0}, "attn_light_heads=0 must be at least 1"),
        ({"attn_heavy_dim_head": 0}, "attn_heavy_dim_head=0 must be at least 1"),
        ({"attn_num_routed_kv": 0}, "attn_num_routed_kv=0 must be at least 1"),
        ({"ff_light_mult": 0}, "ff_light_mult=0 must be positive"),
    ],
)
def test_arguments_that_cannot_be_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routedvit.ConditionalRoutedViT(**{**BASE, **kwargs})


def test_an_unknown_router_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"router_kwargs has no 'route_block_size'.*n_iters"):
        routedvit.ConditionalRoutedViT(**BASE, router_kwargs={"route_block_size": 8})


def test_an_image_that_the_windows_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"light_window=4 divides, not 6 x 8"):
        routedvit.ConditionalRoutedViT(**BASE)(torch.randn(1, 3, 24, 32))


def test_weights_of_another_model_are_refused() -> None:
    other = colt5_attention.ConditionalRoutedViT(**{**BASE, "dim": 16, "depth": 1})
    with pytest.raises(
        ValueError, match=r"not the weights .*lack transformer.layers.1.0.null_q_token"
    ):
        routedvit.ConditionalRoutedViT(**BASE).load_state_dict(other.state_dict())


def test_triton_asked_for_on_a_gpu_is_insisted_on() -> None:
    part = ConditionalRoutedFeedForward(8, num_heavy_tokens=2, use_triton=True)

    class OnGpu:
        is_cuda, is_meta, dtype = True, False, torch.float32

    set_backend("torch")
    with pytest.raises(ValueError, match=r"use_triton=True .* the backend is torch"):
        part.insist_on_triton(OnGpu())  # type: ignore[arg-type]
    set_backend(None)


@pytest.mark.parametrize("package_names", [True, False])
def test_keys_that_do_not_fit_have_the_names_that_are_saved(package_names: bool) -> None:
    model = routedvit.ConditionalRoutedViT(**BASE)
    model.use_package_names(package_names)
    result = model.load_state_dict({}, strict=False)
    assert set(result.missing_keys) == set(model.state_dict())


@pytest.mark.parametrize("package_names", [True, False])
def test_weights_under_either_names_load_but_not_under_both(package_names: bool) -> None:
    """An average of the weights, say, is kept by the names of the parameters."""
    _, ours, images = pair()
    other = routedvit.ConditionalRoutedViT(**BASE)
    other.use_package_names(package_names)
    by_path = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for state in (by_path, ours.state_dict()):
        for p in other.parameters():
            nn.init.zeros_(p)
        other.load_state_dict(state)
        assert torch.equal(other(images), ours(images))
    with pytest.raises(ValueError, match="they hold also"):
        other.load_state_dict({**by_path, **ours.state_dict()})


def test_under_paths_torch_finds_the_parameters_of_a_state_dict() -> None:
    _, ours, images = pair()
    ours.use_package_names(False)
    state = ours.state_dict()
    assert state.keys() == dict(ours.named_parameters()).keys()
    zeros = {name: torch.zeros_like(p) for name, p in state.items()}
    assert not torch.func.functional_call(ours, zeros, images, strict=True).any()
    fresh = routedvit.ConditionalRoutedViT(**BASE)
    fresh.use_package_names(False)
    optimizers = [torch.optim.AdamW(model.parameters()) for model in (ours, fresh)]
    ours(images).sum().backward()
    optimizers[0].step()
    weights, moments = get_state_dict(ours, optimizers[0])
    set_state_dict(fresh, optimizers[1], model_state_dict=weights, optim_state_dict=moments)
    assert torch.equal(fresh(images), ours(images))
    for p, q in zip(ours.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizers[0].state[p]["exp_avg"], optimizers[1].state[q]["exp_avg"])


def test_a_model_from_the_meta_device_is_initialised_like_any() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = routedvit.ConditionalRoutedViT(**BASE)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, torch.nan)
    model.init_weights()
    usual = routedvit.ConditionalRoutedViT(**BASE)
    for (name, p), q in zip(model.named_parameters(), usual.parameters(), strict=True):
        assert p.isfinite().all(), name
        if p.numel() >= 32:  # enough to tell their spread
            torch.testing.assert_close(p.std(), q.std(), rtol=0.5, atol=0.01, msg=name)


def test_no_images_give_no_logits() -> None:
    assert routedvit.ConditionalRoutedViT(**BASE)(torch.randn(0, 3, 32, 32)).shape == (0, 7)
