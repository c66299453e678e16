"""Weights are read in place of a call only while nobody has wrapped or hooked the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import routedvit
from routedvit.layers import RoutedBlock
from routedvit.layers.wrapped import is_plain


class Halved(Tensor):
    """A weight kept in another form, as torchao's are: it can be multiplied with and no more."""

    @staticmethod
    def __new__(cls, half: Tensor) -> Halved:
        return Tensor._make_wrapper_subclass(cls, half.shape, dtype=torch.float32)

    def __init__(self, half: Tensor) -> None:
        self.half = half

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["half"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], *_: object) -> Halved:
        return cls(parts["half"])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].half * 2, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].half)
        raise NotImplementedError(func)


class Adapter(nn.Module):
    """LoRA as adapters do it: beside the layer, which it calls with its own input."""

    def __init__(self, layer: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        self.layer.weight += self.up.weight @ self.down.weight
        return self.layer


def replace(module: nn.Module, change: Callable[[nn.Module], nn.Module], *classes: type) -> None:
    for name, child in module.named_children():
        if isinstance(child, classes):
            setattr(module, name, change(child))
        else:
            replace(child, change, *classes)


@pytest.mark.parametrize("kv_routes", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_adapters_compute_what_they_merge_to(kv_routes: int, bias: bool) -> None:
    """Also the one of the keys and values of several routes, whose weight is read in slices."""
    torch.manual_seed(0)
    model = timm.create_model(
        "colt5_vit_test", depth=2, img_size=96, kv_routes=kv_routes, qkv_bias=bias
    ).eval()
    replace(model, Adapter, nn.Linear)
    x = torch.randn(2, 3, 96, 96)
    out = model(x)
    out.sum().backward()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert all(adapter.up.weight.grad is not None for adapter in adapters)
    replace(model, Adapter.merged, Adapter)
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)


def test_adapters_of_the_package_compatible_model_compute_what_they_merge_to() -> None:
    """Layers that hold a norm besides are no linear layers to them."""
    torch.manual_seed(0)
    model = routedvit.ConditionalRoutedViT(
        image_size=32, patch_size=8, num_classes=3, dim=32, depth=1,
        attn_num_heavy_tokens_q=4, attn_num_heavy_tokens_kv=4, attn_heavy_dim_head=16,
        attn_heavy_heads=2, attn_light_dim_head=16, attn_light_heads=2,
        attn_light_window_size=4, ff_num_heavy_tokens=4, ff_heavy_mult=2, ff_light_mult=1,
    ).eval()  # fmt: skip
    replace(model, Adapter, nn.Linear)
    x = torch.randn(2, 3, 32, 32)
    out = model(x)
    replace(model, Adapter.merged, Adapter)
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["attn.heavy.kv", "attn.norm_heavy", "mlp.norm_heavy"])
def test_hooks_see_and_change_what_a_module_gives(name: str) -> None:
    torch.manual_seed(0)
    block = RoutedBlock(32, 2, num_prefix=0, light_window=2, kv_routes=2, separate_norms=True)
    x = torch.randn(2, 16, 32)
    before = block(x, grid=(4, 4))
    handle = block.get_submodule(name).register_forward_hook(lambda m, args, out: out * 0)
    assert not torch.allclose(block(x, grid=(4, 4)), before)
    handle.remove()
    torch.testing.assert_close(block(x, grid=(4, 4)), before)


@pytest.mark.parametrize("name", ["attn.light", "attn.light.proj", "attn.light.proj_drop"])
def test_what_a_hook_holds_is_not_written_to(name: str) -> None:
    block = RoutedBlock(32, 2, num_prefix=0, light_window=2, null_token=True)
    nn.init.ones_(block.attn.null_token)
    held: list[Tensor] = []
    block.get_submodule(name).register_forward_hook(
        lambda m, args, out: held.extend([out, out.clone()])
    )
    block(torch.randn(2, 16, 32), grid=(4, 4))
    assert torch.equal(*held)


def test_backward_hooks_see_every_module_and_change_no_gradient() -> None:
    options = {"kv_routes": 2, "separate_norms": True, "null_token": True}
    x, gradients, seen = torch.randn(2, 16, 32, requires_grad=True), [], set()
    for hooked in (False, True):
        torch.manual_seed(0)
        block = RoutedBlock(32, 2, num_prefix=0, light_window=2, **options)
        for name, module in block.named_modules() if hooked else ():
            module.register_full_backward_hook(lambda *_, name=name: seen.add(name))
        block(x, grid=(4, 4)).square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    with_weights = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
    assert with_weights - seen == set()
    torch.testing.assert_close(*gradients)


def test_parametrised_weights_give_the_same() -> None:
    torch.manual_seed(0)
    model = timm.create_model("colt5_vit_test", depth=1, img_size=96, kv_routes=2).eval()
    x = torch.randn(1, 3, 96, 96)
    out = model(x)
    parametrizations.weight_norm(model.blocks[0].attn.heavy.kv)
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_of_a_class_of_their_own_are_used_by_their_layer(compiled: bool) -> None:
    """Quantisation by torchao changes the weights of a linear layer, not the layer."""
    torch.manual_seed(0)
    model = timm.create_model("colt5_vit_test", depth=1, img_size=96, kv_routes=2).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        out = model(x)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(Halved(module.weight / 2), requires_grad=False)
        run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        torch.testing.assert_close(run(x), out, rtol=1e-4, atol=1e-4)


def test_hooks_of_zero_3_do_not_count() -> None:
    """They gather weights; the call would compute all heads for each route."""
    linear = nn.Linear(2, 2)
    assert is_plain(linear, nn.Linear)
    linear.register_forward_pre_hook(lambda *args: None)
    assert not is_plain(linear, nn.Linear)
    linear.weight.ds_id = 0
    assert is_plain(linear, nn.Linear)
    assert not is_plain(linear, nn.LayerNorm)
