"""The model compiles without a break, exports with free sizes, and runs in onnxruntime."""

from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import routedvit

SIZES = [(3, 32, 32), (1, 48, 64), (5, 20, 36)]  # batch and pixels; patches 8x8, 12x16, 5x9
DYNAMIC = ({0: Dim("b", min=1, max=64), 2: 4 * Dim("h", max=64), 3: 4 * Dim("w", max=64)},)
VARIANTS = [{}, {"rope": True, "pos_embed": "none", "kv_routes": 2}, {"pos_embed": "sincos"}]


def create(**kwargs: object) -> routedvit.RoutedVisionTransformer:
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 4, "num_classes": 5, "depth": 2}
    return timm.create_model("colt5_vit_test", **{**defaults, **kwargs})


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kwargs", VARIANTS[:2])
def test_compiles_as_one_graph_without_recompiling(kwargs):
    torch._dynamo.reset()
    model = create(**kwargs).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in range(3):
            x = images(2, 32, 32) + seed
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("policy", ["none", "heavy", "block"])
def test_compiled_training_has_the_gradients_of_eager(policy):
    torch._dynamo.reset()
    model = create(drop_path_rate=0.0).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    model.set_grad_checkpointing(policy=policy)
    gradients = []
    for run in (model, compiled, compiled):
        model.zero_grad()
        run(images(2, 32, 32)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "block"])
def test_inductor_gives_the_gradients_of_eager(policy):
    torch._dynamo.reset()
    model = create().train()
    model.set_grad_checkpointing(policy=policy)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(images(2, 32, 32)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_exports_with_free_batch_and_image_size(kwargs):
    model = create(dynamic_img_size=True, **kwargs).eval()
    exported = torch.export.export(model, (images(2, 32, 32),), dynamic_shapes=DYNAMIC).module()
    for size in SIZES:
        torch.testing.assert_close(exported(images(*size)), model(images(*size)))


@pytest.mark.parametrize("kwargs", VARIANTS[1:2])
def test_runs_in_onnxruntime_at_several_sizes(kwargs, tmp_path: Path):
    model = create(dynamic_img_size=True, **kwargs).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (images(2, 32, 32),), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        (out,) = session.run(None, {session.get_inputs()[0].name: images(*size).numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(images(*size)).detach())
