"""The models under torch.func, forward-mode AD and second derivatives.

Attention runs by PyTorch's own operators here, as it must for all but first gradients: its fused
ones know neither forward-mode AD nor a second derivative, in timm's models either.
"""

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import routedvit
from routedvit.ops import set_backend

OPTIONS = {
    "defaults": {},
    "coordinate descent": {"router_kwargs": {"solver": "coordinate_descent", "eps": 0.5}},
    "two kv routes": {"kv_routes": 2, "null_token": True, "null_kv": True},
    "RMSNorm, separate norms": {"norm_layer": "rmsnorm", "separate_norms": True, "route_raw": True},
    "all heavy": {"q_capacity": 1.0, "kv_capacity": 1.0, "ffn_capacity": 1.0},
    "random": {"router": "random"},
    "drop-path": {"drop_path_rate": 0.5, "efficient_drop_path": True},
}


def routed(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "depth": 2, "num_classes": 3}
    return timm.create_model("colt5_vit_test", **size, **kwargs)


def conditional() -> nn.Module:
    torch.manual_seed(0)
    return routedvit.ConditionalRoutedViT(
        image_size=16, patch_size=4, num_classes=3, dim=16, depth=2, attn_num_heavy_tokens_q=2,
        attn_num_heavy_tokens_kv=2, attn_heavy_dim_head=8, attn_heavy_heads=2,
        attn_light_dim_head=8, attn_light_heads=2, attn_light_window_size=2, ff_num_heavy_tokens=5,
        ff_heavy_mult=2, ff_light_mult=0.5, router_straight_through=False,
    )  # fmt: skip


MODELS = [
    *(pytest.param(lambda o=o: routed(**o), id=name) for name, o in OPTIONS.items()),
    pytest.param(conditional, id="ConditionalRoutedViT"),
]
Model = Callable[[], nn.Module]
Parameters = dict[str, Tensor]
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def parameters(model: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model: nn.Module) -> Callable[[Parameters, Tensor, Tensor], Tensor]:
    def loss(weights: Parameters, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (image[None],)), label[None])

    return loss


@pytest.mark.parametrize("make", MODELS)
def test_gradients_per_sample_are_those_of_one_sample_after_the_other(make: Model) -> None:
    model = make().double().eval()
    per_sample = vmap(grad(loss_of(model)), in_dims=(None, 0, 0))
    found = per_sample(parameters(model), images(), LABELS)
    for i, image in enumerate(images()):
        model.zero_grad()
        F.cross_entropy(model(image[None]), LABELS[i : i + 1]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", MODELS)
def test_gradients_per_sample_in_training(make: Model) -> None:
    model = make().train()
    per_sample = vmap(grad(loss_of(model)), in_dims=(None, 0, 0), randomness="different")
    found = per_sample(parameters(model), images().float(), LABELS)
    assert all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("make", MODELS)
def test_hessian_vector_products_by_autograd_and_by_torch_func_agree(make: Model) -> None:
    """The one by our own gradients, the other by PyTorch that differentiates itself."""
    model = make().double().eval()
    leaves = list(model.parameters())
    vector = [torch.sin(torch.arange(p.numel())).view_as(p).double() for p in leaves]
    first = torch.autograd.grad(F.cross_entropy(model(images()), LABELS), leaves, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(first, vector, strict=True))
    by_autograd = torch.autograd.grad(along, leaves, materialize_grads=True)

    def loss(weights: Parameters) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (images(),)), LABELS)

    weights = parameters(model)
    _, by_func = jvp(grad(loss), (weights,), (dict(zip(weights, vector, strict=True)),))
    scale = max(h.abs().max() for h in by_func.values())
    for found, expected in zip(by_autograd, by_func.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("make", MODELS)
def test_forward_mode_is_the_transpose_of_the_jacobian(make: Model) -> None:
    model, x = make().double().eval(), images()[:1]
    tangent = images()[1:2]
    jacobian = jacrev(model)(x)
    out, moved = jvp(model, (x,), (tangent,))
    torch.testing.assert_close(out, model(x))
    torch.testing.assert_close(moved[0], jacobian.flatten(2)[0] @ tangent.flatten())
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, moved)


@pytest.mark.parametrize("make", [routed, conditional])
def test_an_ensemble_runs_as_one_model(make: Model) -> None:
    models = [make().double().eval() for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    weights, buffers = stack_module_state(models)

    def one(weights: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
        return functional_call(models[0], (weights, buffers), (x,))

    found = vmap(one, in_dims=(0, 0, None))(weights, buffers, images())
    torch.testing.assert_close(found, torch.stack([model(images()) for model in models]))


def test_a_gradient_penalty_of_the_images_trains_through_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = []
    for name in ("torch", "triton"):
        set_backend(name)
        model, x = routed().train(), images()[:1].float().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    set_backend(None)
    scale = max(g.abs().max() for g in found[0])
    for of_torch, of_triton in zip(*found, strict=True):
        torch.testing.assert_close(of_triton, of_torch, rtol=1e-3, atol=1e-5 * scale)
