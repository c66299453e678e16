"""A run begins from weights of a dense ViT or of a routed one, or says why it cannot."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLU
from torch import Tensor, nn

import routedvit
from routedvit.models.warm_start import warm_start

SHAPE = {"img_size": 32, "patch_size": 8}
# the routed twin of timm's test_vit: its tokens, its heads, its MLP
TWIN = {
    **SHAPE,
    "num_heads": 2,
    "mlp_ratio": 3,
    "reg_tokens": 0,
    "global_pool": "token",
    "qk_norm": False,
    "init_values": 0.0,
}
FULL = {"q_capacity": 1, "kv_capacity": 1, "ffn_capacity": 1}


def routed(seed: int = 1, **kwargs: object) -> routedvit.RoutedVisionTransformer:
    torch.manual_seed(seed)
    return timm.create_model("colt5_vit_test", **{**TWIN, "num_classes": 5, **kwargs}).eval()


def dense(num_classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", **SHAPE, num_classes=num_classes).eval()


def save(model: nn.Module, path: Path) -> str:
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights, "epoch": 3}, path)
    return str(path)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["dense.safetensors", "dense.pth"])
def test_a_dense_vit_is_computed_on_at_capacity_one(name: str, tmp_path: Path) -> None:
    twin, model = dense(), routed(**FULL)
    started = warm_start(model, save(twin, tmp_path / name))
    torch.testing.assert_close(model(images()), twin(images()), atol=1e-4, rtol=1e-4)
    assert started.kind == "dense"
    assert "blocks.0.attn.heavy.kv.weight" not in started.fresh
    assert "blocks.0.attn.light.proj.weight" in started.fresh
    assert "split" in started.report
    assert str(started).startswith("warm start from the dense weights of")


def test_an_export_is_taken_as_it_is_from_its_folder(tmp_path: Path) -> None:
    before, model = routed(), routed(seed=2)
    timm.models.save_for_hf(before, str(tmp_path), safe_serialization=True)
    started = warm_start(model, str(tmp_path))
    assert torch.equal(model(images()), before(images()))
    assert (started.kind, started.fresh) == ("routed", [])
    model = routed(seed=3)
    warm_start(model, f"local-dir:{tmp_path}")
    assert torch.equal(model(images()), before(images()))


@pytest.mark.parametrize("num_classes", [0, 7])
def test_another_classifier_stays_fresh(num_classes: int, tmp_path: Path) -> None:
    source = save(routed(num_classes=num_classes), tmp_path / "a.safetensors")
    model = routed(seed=2)
    head = model.head.weight.clone()
    started = warm_start(model, source)
    assert started.fresh == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, head)
    started = warm_start(model, save(dense(num_classes), tmp_path / "dense.safetensors"))
    assert "head.weight" in started.fresh


def test_an_mae_encoder_starts_a_classifier_whatever_its_pool(tmp_path: Path) -> None:
    source = save(routed(num_classes=0), tmp_path / "mae.safetensors")
    model = routed(seed=2, global_pool="avg")
    warm_start(model, source)
    assert torch.equal(model.fc_norm.weight, torch.ones(64))


def test_positions_and_kernels_are_resampled(tmp_path: Path) -> None:
    source = save(routed(), tmp_path / "a.safetensors")
    model = routed(seed=2, img_size=48)
    started = warm_start(model, source)
    assert "resampled" in started.report
    small = routed().pos_embed[:, 1:].mean()
    torch.testing.assert_close(model.pos_embed[:, 1:].mean(), small, atol=1e-3, rtol=0.1)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("nowhere", "nowhere is no file, no folder with model.safetensors, no timm model"),
        ("EMPTY", "model.safetensors does not exist"),
        ("BROKEN", "cannot be read"),
        (
            "WIDE",
            "embed_dim=192, depth=12, the routed model is embed_dim=64, depth=6: choose .* or "
            "pass embed_dim=192, depth=12",
        ),
        ("ROUTED", "they hold also blocks.0.attn.light.q_norm.weight"),
        ("test_vit4", "timm cannot give the weights of test_vit4"),
    ],
)
def test_what_cannot_be_used_is_said_in_words(source: str, words: str, tmp_path: Path) -> None:
    if source == "EMPTY":
        source = str(tmp_path)
    elif source == "BROKEN":
        (tmp_path / "a.safetensors").write_bytes(b"no weights")
        source = str(tmp_path / "a.safetensors")
    elif source == "WIDE":
        source = save(timm.create_model("vit_tiny_patch16_224"), tmp_path / "wide.pth")
    elif source == "ROUTED":
        source = save(routed(qk_norm=True), tmp_path / "qk_norm.pth")
    with pytest.raises(ValueError, match=words) as caught:
        warm_start(routed(), source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "parts",
    [
        {"mlp_ratio": 3.0},
        {"qk_norm": False, "init_values": None},
        {"qkv_bias": False, "proj_bias": False},
        {"norm_layer": "rmsnorm"},
        {"embed_norm_layer": "layernorm"},
        {"mlp_layer": SwiGLU, "mlp_ratio": 8 / 3},
        {"mlp_ratio": 3.0, "qk_norm": False, "init_values": None, "pre_norm": True},
    ],
    ids=str,
)
def test_parts_that_differ_are_told_as_arguments_that_mend_it(parts, tmp_path: Path) -> None:
    as_routed = {"num_heads": 4, "mlp_ratio": 4, "qk_norm": True, "init_values": 1.0}
    source = timm.create_model("test_vit", **SHAPE, **(as_routed | parts))
    path = save(source, tmp_path / "dense.pth")
    with pytest.raises(ValueError, match="create the routed model with") as caught:
        warm_start(timm.create_model("colt5_vit_test", **SHAPE), path)
    given = json.loads(re.search(r"\{.*\}", str(caught.value))[0])
    assert given.keys() == parts.keys()
    assert warm_start(timm.create_model("colt5_vit_test", **SHAPE, **given), path).kind == "dense"


def test_only_routed_models_are_started_this_way() -> None:
    with pytest.raises(ValueError, match=r"VisionTransformer is not a routed model.*pretrained"):
        warm_start(dense(), "x.pth")


def export(model: nn.Module, folder: Path) -> str:
    """As timm and an export of this project lay weights down."""
    timm.models.save_for_hf(
        model, folder, model_args=timm.models.get_model_args(model), safe_serialization=True
    )
    return str(folder)


@pytest.mark.parametrize("size", [(32, 128), (64, 256), (72, 128), (64, 64)])
@pytest.mark.parametrize("way", ["folder", "file", "local-dir"])
def test_positions_keep_their_places_on_grids_that_are_not_square(way, size, tmp_path) -> None:
    """4 x 16 patches are as many as 8 x 8; config.json beside the weights tells them apart."""
    source = routed(img_size=(32, 128))
    nn.init.normal_(source.pos_embed)
    folder = export(source, tmp_path / "wide")
    expected = routed(img_size=(32, 128))
    expected.load_state_dict(source.state_dict())
    expected.set_input_size(size)
    name = {"file": f"{folder}/model.safetensors", "local-dir": f"local-dir:{folder}"}
    model = routed(seed=2, img_size=size)
    started = warm_start(model, name.get(way, folder))
    assert ("resampled   pos_embed" in started.report) == (size != (32, 128))
    torch.testing.assert_close(model.pos_embed, expected.pos_embed)


def test_without_a_word_of_the_grid_as_many_positions_are_the_same_ones(tmp_path: Path) -> None:
    source = routed(img_size=(32, 128))
    model = routed(seed=2, img_size=(32, 128))
    warm_start(model, save(source, tmp_path / "w.safetensors"))
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_a_dense_grid_is_read_from_beside_the_weights(tmp_path: Path) -> None:
    twin = timm.create_model("test_vit", **{**SHAPE, "img_size": (32, 128)}, num_classes=5).eval()
    nn.init.normal_(twin.pos_embed)
    model = routed(**FULL, img_size=(32, 128))
    warm_start(model, export(twin, tmp_path / "dense"))
    x = torch.randn(2, 3, 32, 128)
    torch.testing.assert_close(model(x), twin(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_other_heads_are_refused_where_anything_tells_them(prefix: str, tmp_path: Path) -> None:
    """Shapes do not."""
    folder = export(dense(), tmp_path / "dense")
    with pytest.raises(ValueError, match=r"num_heads=2, the routed one num_heads=4"):
        warm_start(routed(num_heads=4), prefix + folder)


@pytest.mark.parametrize("name", ["num_heads", "light_heads"])
def test_other_heads_of_a_routed_model_are_refused_too(name: str, tmp_path: Path) -> None:
    both = {"num_heads": 2, "light_heads": 2, "light_head_dim": 16}
    few = {**both, name: 1, "light_head_dim": 16 if name == "num_heads" else 32}
    folder = export(routed(**both), tmp_path / "routed")
    with pytest.raises(ValueError, match=f"{name}=2, this one has {name}=1"):
        warm_start(routed(**few), folder)
    warm_start(routed(**both), folder)


@pytest.mark.parametrize("model_args", [{}, {"img_size": 64, "patch_size": 0}, {"strange": 1}])
def test_a_config_that_tells_of_another_model_says_nothing(model_args, tmp_path: Path) -> None:
    source = routed()
    folder = Path(export(source, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_args": model_args}))
    model = routed(seed=2)
    warm_start(model, str(folder))
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_other_prefix_tokens_are_refused_in_words(tmp_path: Path) -> None:
    folder = export(routed(reg_tokens=1), tmp_path / "one")
    with pytest.raises(ValueError, match="2 rows for prefix tokens, this model 3; set class_token"):
        warm_start(routed(reg_tokens=2), folder)
