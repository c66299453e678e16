"""A compiled training step with the Triton backend: right, reproducible, and never waiting.

The kernels one by one are tested by `tests/unit/ops/test_*_triton.py`, on the GPU too.
"""

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

import routedvit  # noqa: F401  registers the models
from routedvit.ops import set_backend
from routedvit.training.ahead import Ahead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The patch embedding's convolution must not differ between what is compared."""
    torch._dynamo.reset()
    with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True, benchmark=False):
        yield
    set_backend(None)


def build(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("colt5_vit_test", img_size=96).to("cuda", dtype).train()
    return model, torch.randn(4, 3, 96, 96, device="cuda", dtype=dtype)


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    forward(x).float().square().mean().backward()
    return [p.grad.float() for p in model.parameters()]


@pytest.mark.parametrize("policy", ["none", "block"])
def test_inductor_with_kernels_has_the_gradients_of_the_eager_reference(policy):
    model, x = build()
    model.set_grad_checkpointing(policy=policy)
    set_backend("torch")
    expected = gradients(model, model, x)
    set_backend("triton")
    found = gradients(model, torch.compile(model, fullgraph=True), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_sublayers_that_drop_images_compile_with_recomputation():
    """The images are drawn on the device and, recomputed, drawn alike."""
    torch.manual_seed(0)
    options = {"depth": 2, "drop_path_rate": 0.5, "efficient_drop_path": True}
    model = timm.create_model("colt5_vit_test", img_size=96, **options).to("cuda").train()
    x = torch.randn(8, 3, 96, 96, device="cuda")
    set_backend("triton")
    found = []
    for policy in ("none", "block"):
        torch._dynamo.reset()
        model.set_grad_checkpointing(policy=policy)
        torch.manual_seed(1)
        found.append(gradients(model, torch.compile(model, fullgraph=True), x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_bfloat16_loses_no_more_with_the_kernels_than_without():
    model, x = build()
    set_backend("torch")
    exact = gradients(model, model, x)
    model, x = build(torch.bfloat16)
    errors = []
    for backend in ("torch", "triton"):
        set_backend(backend)
        found = gradients(model, model, x)
        errors.append(sum((a - b).square().sum() for a, b in zip(found, exact, strict=True)))
    assert errors[1] <= 1.5 * errors[0]


def test_two_steps_are_bitwise_equal():
    model, x = build(torch.bfloat16)
    set_backend("triton")
    compiled = torch.compile(model, fullgraph=True)
    first, second = gradients(model, compiled, x), gradients(model, compiled, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_steps_of_many_keys_are_bitwise_equal_when_asked_for():
    """Flash attention has more than one block of keys above 128; the model above has fewer."""
    torch.manual_seed(0)
    model = timm.create_model("colt5_vit_ti", img_size=448, depth=2).to("cuda", torch.bfloat16)
    x = torch.randn(2, 3, 448, 448, device="cuda", dtype=torch.bfloat16)
    set_backend("triton")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(model, model, x), gradients(model, model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cuda_graphs_of_torch_compile_take_the_kernels():
    model, x = build(torch.bfloat16)
    set_backend("triton")
    expected = gradients(model, torch.compile(model, fullgraph=True), x)
    torch._dynamo.reset()
    graphed = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        found = gradients(model, graphed, x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)


def test_images_arrive_while_the_one_before_is_worked_on():
    """Checks the values only: a copy that came too late would show in them."""
    given = [{"image": torch.full((1 << 22,), float(i)).pin_memory()} for i in range(8)]
    work = torch.randn(2048, 2048, device="cuda")
    sums = []
    for batch in Ahead(torch.device("cuda"))(given):
        for _ in range(10):
            torch.mm(work, work)
        sums.append(batch["image"].double().mean())
    assert [float(s) for s in sums] == list(range(8))


def test_a_warm_step_neither_recompiles_nor_waits_for_the_device():
    model, x = build(torch.bfloat16)
    set_backend("triton")
    compiled = torch.compile(model, fullgraph=True)
    gradients(model, compiled, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            gradients(model, compiled, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
