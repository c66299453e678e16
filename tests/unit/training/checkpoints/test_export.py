"""Exported weights are the model, or the export fails at once."""

import json

import pytest
import timm
import torch

from routedvit.training.checkpoints.export import export_model
from routedvit.training.config.run import ConfigError
from tests.unit.training.fake_engine import FakeEngine

KWARGS = {"num_classes": 3, "img_size": 64}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", **KWARGS).eval()


def test_timm_loads_them_with_equal_logits(model, tmp_path):
    path = export_model(FakeEngine(model), tmp_path, name="test_vit", kwargs=KWARGS)
    images = torch.randn(2, 3, 64, 64)
    loaded = timm.create_model("test_vit", checkpoint_path=str(path), **KWARGS).eval()
    assert torch.equal(loaded(images), model(images))
    described = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(described(images), model(images))


def test_the_config_says_how_images_were_prepared(model, tmp_path):
    data_config = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "input_size": (3, 64, 64)}
    export_model(
        FakeEngine(model), tmp_path, name="test_vit", kwargs=KWARGS, data_config=data_config
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "test_vit"
    assert config["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]


def test_buffers_come_along(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    path = export_model(FakeEngine(model), tmp_path, name="test_resnet", kwargs={"num_classes": 3})
    loaded = timm.create_model("test_resnet", checkpoint_path=str(path), num_classes=3).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))


def test_arguments_that_do_not_make_this_model_fail_now(model, tmp_path):
    with pytest.raises(RuntimeError, match="head"):
        export_model(FakeEngine(model), tmp_path, name="test_vit", kwargs={"num_classes": 4})


def test_what_training_began_from_is_not_loaded_again(model, tmp_path):
    kwargs = KWARGS | {"checkpoint_path": "/nowhere.safetensors", "pretrained": False}
    export_model(FakeEngine(model), tmp_path, name="test_vit", kwargs=kwargs)
    assert "checkpoint_path" not in (tmp_path / "config.json").read_text()


def test_a_full_disk_leaves_the_earlier_weights_and_is_told(model, tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    export_model(FakeEngine(model), folder, name="test_vit", kwargs=KWARGS)
    (folder / "NOTES.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("timm.models.save_for_hf", full)
    with pytest.raises(ConfigError, match=r"weights \(no space left on device\); make room"):
        export_model(FakeEngine(model), folder, name="test_vit", kwargs=KWARGS)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export_model(FakeEngine(model), folder, name="test_vit", kwargs=KWARGS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
