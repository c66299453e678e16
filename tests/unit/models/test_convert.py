"""Dense weights in a routed model: at capacity 1 it computes what the dense one did.

The dense models are timm's, small, with random weights in which nothing is 0 or 1.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

import routedvit
from routedvit.convert import main

NAME = "colt5_vit_test"
# what a dense model of that width may look like, and what its routed twin is asked for
SOURCES: dict[str, dict[str, Any]] = {
    "AugReg": {},
    "DeiT III": {"no_embed_class": True, "init_values": 1e-2},
    "DINOv2 with registers": {"no_embed_class": True, "init_values": 1e-2, "reg_tokens": 4,
                              "num_classes": 0},
    "DINOv2 giant": {"no_embed_class": True, "init_values": 1e-2, "reg_tokens": 4,
                     "mlp_layer": SwiGLUPacked, "act_layer": "silu", "mlp_ratio": 4.5},
    "registers with positions": {"reg_tokens": 2},
    "SwiGLU and RMSNorm": {"mlp_layer": SwiGLU, "act_layer": "silu", "norm_layer": "rmsnorm",
                           "mlp_ratio": 8 / 3},
    "gated GELU": {"mlp_layer": SwiGLU},
    "big_vision, average pool": {"class_token": False, "global_pool": "avg"},
    "SigLIP": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "CLIP": {"pre_norm": True, "act_layer": "quick_gelu",
             "norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    "qk-norm, few biases": {"qk_norm": True, "qkv_bias": False, "proj_bias": False},
    "average of all tokens, norm before it": {"global_pool": "avg", "fc_norm": False,
                                              "pool_include_prefix": True},
    "no positions": {"pos_embed": "none"},
    "norm in the stem": {"embed_norm_layer": "layernorm"},
    "AIMv2": {"class_token": False, "global_pool": "avg", "mlp_layer": SwiGLU, "act_layer": "silu",
              "qkv_bias": False, "proj_bias": False, "norm_layer": partial(RmsNorm, eps=1e-3),
              "embed_norm_layer": partial(RmsNorm, eps=1e-3)},
}  # fmt: skip
UNTOLD_BY_WEIGHTS = (  # activation, epsilon, image size, pooling
    "SigLIP", "CLIP", "AIMv2", "gated GELU", "no positions", "average of all tokens, norm before it"
)  # fmt: skip


def make_dense(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}
    model = VisionTransformer(**{**size, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def convert(dense: Any, **kwargs: Any) -> routedvit.RoutedVisionTransformer:
    return routedvit.convert_dense(dense, NAME, report=None, depth=2, **kwargs)


def images(height: int = 32, width: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def assert_same_outputs(ours: nn.Module, dense: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), dense.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_a_dense_model_goes_on_as_it_was(name: str) -> None:
    dense = make_dense(**SOURCES[name])
    assert_same_outputs(convert(dense), dense, images())


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in UNTOLD_BY_WEIGHTS])
def test_so_does_its_state_dict_alone(name: str) -> None:
    dense = make_dense(**SOURCES[name])
    assert_same_outputs(convert(dense.state_dict()), dense, images())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kv_routes": 2},
        {"separate_norms": True},
        {"dense_blocks": 1},
        {"router": "all_heavy"},
        {"light_heads": 0, "light_mlp_ratio": 0},
        {"no_embed_class": True},
        {"null_token": True},
        {"router_kwargs": {"straight_through": True}},
    ],
    ids=str,
)
def test_options_of_the_routed_model_keep_the_function(kwargs: dict[str, Any]) -> None:
    dense = make_dense(reg_tokens=1)
    assert_same_outputs(convert(dense, **kwargs), dense, images())


@pytest.mark.parametrize(
    ("img_size", "patch_size"), [(48, 4), ((24, 40), 4), (64, 8), (30, 5)], ids=str
)
@pytest.mark.parametrize("name", ["AugReg", "DINOv2 with registers"])
def test_other_image_and_patch_sizes_are_resampled_as_timm_does(name, img_size, patch_size) -> None:
    dense = make_dense(**SOURCES[name])
    ours = convert(dense, img_size=img_size, patch_size=patch_size)
    dense.set_input_size(img_size, patch_size)
    assert_same_outputs(ours, dense, images(*dense.patch_embed.img_size))


@pytest.mark.parametrize("pad", [False, True])
def test_images_of_any_size_stay_welcome(pad: bool) -> None:
    dense = make_dense(dynamic_img_size=True, dynamic_img_pad=pad)
    height, width = (23, 41) if pad else (24, 40)
    assert_same_outputs(convert(dense), dense, images(height, width))


def test_a_grid_that_is_not_square_needs_the_model_itself() -> None:
    dense = make_dense(img_size=(16, 32))
    assert_same_outputs(convert(dense), dense, images(16, 32))
    with pytest.raises(ValueError, match=r"no square grid .* the dense model instead"):
        convert(dense.state_dict())


def test_one_channel_sums_the_kernels_of_three() -> None:
    dense = make_dense()
    grey = images(channels=1)
    expected = dense(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(convert(dense, in_chans=1)(grey), expected, rtol=1e-5, atol=1e-5)


def test_new_classes_get_a_new_head_and_keep_the_features() -> None:
    dense = make_dense()
    ours = convert(dense, num_classes=3)
    assert ours(images()).shape == (2, 3)
    features = dense.forward_features(images())
    torch.testing.assert_close(ours.forward_features(images()), features, rtol=1e-5, atol=1e-5)


def test_the_light_path_begins_at_zero_and_learns() -> None:
    ours = convert(make_dense(), q_capacity=0.25, kv_capacity=0.5, ffn_capacity=0.25)
    ours(images()).square().sum().backward()
    for block in ours.blocks:
        for layer in (block.attn.light.proj, block.mlp.light.fc2):
            assert not layer.weight.any()
            assert layer.weight.grad.any()


def test_the_report_accounts_for_every_weight(capsys) -> None:
    dense = make_dense()
    routedvit.convert_dense(dense, NAME, depth=2, num_classes=3, img_size=48)
    lines = [line.split("  x ")[0].split() for line in capsys.readouterr().out.splitlines()]
    kinds = {name: line[0] for line in lines for name in line[1:] if name != "->"}
    assert kinds["cls_token"] == "copied"
    assert kinds["pos_embed"] == "resampled"
    assert kinds["blocks.*.attn.heavy.kv.weight"] == kinds["blocks.*.attn.qkv.weight"] == "split"
    assert kinds["blocks.*.mlp.heavy.fc1.bias"] == "copied"
    assert kinds["blocks.*.attn.light.proj.weight"] == "zero"
    assert kinds["blocks.*.mlp.router.weight"] == "initialised"
    assert [line[0] for line in lines if line[1] == "head.weight"] == ["initialised", "unused"]


def test_lower_capacity_is_taken_over_and_exported() -> None:
    ours = convert(make_dense(), ffn_capacity=0.5)
    routing = ours.routing(images())
    assert routing["blocks.0.ffn"].indices.shape[1] == 32
    assert routing["blocks.0.q"].indices.shape[1] == 64
    assert timm.models.get_model_args(ours)["ffn_capacity"] == 0.5


@pytest.mark.parametrize(
    ("source", "kwargs", "message"),
    [
        ({"depth": 3}, {}, "embed_dim=64, depth=3, the routed model .* depth=2"),
        ({"embed_dim": 32}, {}, "embed_dim=32, .* embed_dim=64"),
        ({"num_heads": 8}, {}, "num_heads=8, the routed one num_heads=4: pass num_heads=8"),
        ({"init_values": 1.0}, {"init_values": 0}, "no place for blocks.0.ls1.gamma"),
        ({}, {"qk_norm": True}, r"lack what becomes blocks.0.attn.heavy.q_norm.weight"),
        ({"scale_attn_norm": True, "norm_layer": nn.LayerNorm}, {}, "blocks.0.attn.norm.weight"),
        ({"act_layer": nn.Tanh}, {}, "activation Tanh"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(source, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        convert(make_dense(**source), **kwargs)


def test_a_model_of_another_kind_is_refused_by_its_class() -> None:
    dense = timm.create_model("eva02_tiny_patch14_224", depth=1)
    with pytest.raises(ValueError, match="dense is a Eva, and only timm's VisionTransformer"):
        convert(dense)


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [
        ({"block_fn": ResPostBlock, "init_values": 0.5}, "blocks.0 of .* ResPostBlock"),
        ({"mlp_layer": GluMlp, "act_layer": "silu"}, "blocks.0.mlp of .* GluMlp"),
        ({"norm_layer": partial(nn.LayerNorm, bias=False)}, "blocks.0.norm1 of .* LayerNorm"),
        ({"norm_layer": "simplenorm"}, "blocks.0.norm1 of .* SimpleNorm"),
        ({"embed_norm_layer": "simplenorm"}, "patch_embed.norm of .* SimpleNorm"),
        ({"embed_norm_layer": partial(RmsNorm, eps=1e-3)}, "eps of the blocks, 1e-06"),
        ({"embed_norm_layer": partial(nn.LayerNorm, eps=1e-6, bias=False)}, "LayerNorm with bias"),
    ],
)
def test_blocks_that_compute_something_else_are_refused(kwargs, part) -> None:
    """Though names and shapes of their weights fit."""
    with pytest.raises(ValueError, match=part):
        convert(make_dense(**kwargs))


def test_a_compiled_model_is_converted_as_the_one_inside() -> None:
    dense = make_dense()
    inside, ours = convert(dense), convert(torch.compile(dense))
    assert torch.equal(inside(images()), ours(images()))


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext", "test_byobnet"])
def test_models_of_another_kind_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no weights of timm's VisionTransformer"):
        convert(timm.create_model(name).state_dict())


@pytest.mark.parametrize("name", ["colt5_vit_xxl", "test_vit"])
def test_only_routed_models_can_be_the_target(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.* choose"):
        routedvit.convert_dense(make_dense(), name, report=None)


def load(
    weights: dict[str, Tensor], folder: Path, *, pretrained: bool = True, **kwargs: Any
) -> nn.Module:
    """Through timm, as a user's checkpoint."""
    file = folder / "weights.safetensors"
    save_file(weights, file)
    if not pretrained:
        return timm.create_model(NAME, checkpoint_path=str(file), **kwargs)
    overlay = {"file": str(file), "num_classes": kwargs.get("num_classes", 1000)}
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.mark.parametrize("pretrained", [True, False])
def test_timm_loads_dense_weights_into_a_routed_model(tmp_path: Path, pretrained: bool) -> None:
    dense = make_dense(img_size=40)
    twin = {"class_token": True, "reg_tokens": 0, "qk_norm": False, "init_values": 0,
            "global_pool": "token", "num_classes": 5, "depth": 2, "patch_size": 4,
            "q_capacity": 1, "kv_capacity": 1, "ffn_capacity": 1}  # fmt: skip
    ours = load(dense.state_dict(), tmp_path, pretrained=pretrained, img_size=32, **twin)
    dense.set_input_size((32, 32))
    assert_same_outputs(ours, dense, images())


def test_timm_loads_dense_weights_into_other_tokens_and_pooling(tmp_path: Path) -> None:
    """No class token, four registers, average pool: the defaults of the larger models."""
    dense = make_dense(img_size=32)
    ours = load(dense.state_dict(), tmp_path, img_size=32, patch_size=4, depth=2, num_classes=5,
                class_token=False, reg_tokens=4, qk_norm=False, init_values=0)  # fmt: skip
    torch.testing.assert_close(ours.fc_norm.weight, dense.norm.weight)
    torch.testing.assert_close(ours.pos_embed[:, 4:], dense.pos_embed[:, 1:])


def test_timm_still_loads_routed_weights_and_resamples_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = timm.create_model(NAME, img_size=64, num_classes=5)
    ours = load(saved.state_dict(), tmp_path, img_size=96, num_classes=5)
    saved.set_input_size((96, 96))
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, saved.state_dict()[name], rtol=0, atol=0)


def test_timm_refuses_weights_of_another_model(tmp_path: Path) -> None:
    alien = timm.create_model("test_byobnet").state_dict()
    with pytest.raises(ValueError, match="neither of a routed nor of a dense"):
        load(alien, tmp_path)
    with pytest.raises(ValueError, match=r"not the weights of .*lack cls_token.* hold also stages"):
        load(alien, tmp_path, pretrained=False)
    longer = timm.create_model(NAME, depth=7).state_dict()
    with pytest.raises(ValueError, match=r"hold also blocks.6.attn.* config.json"):
        load(longer, tmp_path)


@pytest.fixture
def published(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A dense model that timm knows by name, and a file of its weights."""
    dense = copy.deepcopy(timm.create_model("test_vit", num_classes=7)).eval()
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    return dense, tmp_path / "dense.safetensors"


def test_the_command_writes_what_timm_reads(published, tmp_path, capsys) -> None:
    dense, file = published
    heads = dense.blocks[0].attn.num_heads
    out = tmp_path / "out"
    code = main(["--from", "test_vit", "--weights", str(file), "--to", NAME, "--out", str(out),
                 "--set", f"num_heads={heads}", "--set", "light_window=5",
                 "--set", f"mlp_ratio={dense.blocks[0].mlp.fc1.out_features / 64}"])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert "blocks.*.attn.qkv.weight -> blocks.*.attn.heavy.q.weight" in capsys.readouterr().out
    ours = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert_same_outputs(ours, dense, images(*dense.patch_embed.img_size))
    assert tuple(ours.pretrained_cfg["mean"]) == dense.pretrained_cfg["mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "vit_gigantic"], "--from vit_gigantic: timm has no such model"),
        (["--from", "test_byobnet"], "--from test_byobnet is a ByobNet"),
        (["--set", "img_size"], "'img_size' is not KEY=VALUE"),
        (["--set", "colour=3"], "no argument 'colour'"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--to", "colt5_vit_ti"], "embed_dim=64"),
        (["--from", "vit_tiny_patch16_224"], "dense.safetensors does not fit --from vit_tiny"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_code_2(published, tmp_path, capsys, arguments, message):
    _, file = published
    start = ["--from", "test_vit", "--weights", str(file), "--to", NAME, "--out", str(tmp_path)]
    assert main([*start, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
