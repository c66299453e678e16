"""The command draws what the model saw, from a name or an export, and explains mistakes."""

from pathlib import Path

import pytest
import timm
import timm.models
import torch
from PIL import ExifTags, Image

import routedvit  # noqa: F401 (registers the models)
from routedvit import visualize

ARGUMENTS = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10}
DATA_CONFIG = {"input_size": [1, 28, 28], "mean": [0.13], "std": [0.31], "crop_pct": 1.0}


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    noise = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    Image.fromarray((noise * 255).byte().permute(1, 2, 0).contiguous().numpy()).save(path)
    return path


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    torch.manual_seed(0)
    model = timm.create_model("colt5_vit_test", **ARGUMENTS)
    timm.models.save_for_hf(
        model, str(folder), model_args=ARGUMENTS, safe_serialization=True, data_config=DATA_CONFIG
    )
    return folder


@pytest.mark.parametrize("router", ["ffn", "q", "kv0"])
def test_a_name_gives_a_picture_of_every_router(
    photograph: Path, tmp_path: Path, router: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    arguments = [str(photograph), "--model", "colt5_vit_test", "--router", router]
    visualize.main([*arguments, "--size", "64", "--out", str(out)])
    with Image.open(out) as picture:
        assert picture.mode == "RGB"
        assert f"{picture.width} x {picture.height}" in capsys.readouterr().out


def test_an_exported_folder_names_its_model_and_brings_its_weights(exported: Path) -> None:
    torch.manual_seed(0)
    original = timm.create_model("colt5_vit_test", **ARGUMENTS)
    loaded = visualize.load_model(None, exported)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, original.state_dict()[name]), name


def test_images_are_prepared_for_the_model_and_shown_as_prepared(
    exported: Path, photograph: Path
) -> None:
    model = visualize.load_model(None, exported)
    images = visualize.load_images([photograph, photograph], model)
    assert images.shape == (2, 1, 28, 28)
    sheet = visualize.draw(model, images, router="ffn", title="", size=56)
    assert (sheet.dtype, sheet.shape[0]) == (torch.uint8, 3)


def test_a_photograph_is_shown_as_it_was_taken(exported: Path, photograph: Path) -> None:
    """Phones store it as the sensor lay, and how that was in the EXIF tag."""
    with Image.open(photograph) as image:
        upright, lying = image.convert("RGB"), image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    upright.save(photograph.with_name("upright.png"))
    lying.save(photograph.with_name("lying.png"), exif=exif)
    paths = [photograph.with_name(f"{name}.png") for name in ("upright", "lying")]
    pair = visualize.load_images(paths, visualize.load_model(None, exported))
    assert torch.equal(*pair)


def test_a_border_that_fills_no_patch_is_not_drawn() -> None:
    """It would shift every patch of the picture."""
    model = timm.create_model("colt5_vit_test", img_size=40, depth=1).eval()  # 2 x 2 patches of 16
    images = torch.rand(2, 1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    images[:, ..., :32, :32] = images[0, ..., :32, :32]
    sheets = [visualize.draw(model, x, router="ffn", title="", size=64) for x in images]
    assert torch.equal(*sheets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photo}"], "give --model NAME, or a --checkpoint folder"),
        (["{photo}", "--model", "colt5_vit_tset"], "colt5_vit_tset"),
        (["{photo}", "--model", "colt5_vit_test", "--router", "v"], "it has ffn, kv0, q"),
        (["{photo}", "--model", "colt5_vit_test", "--checkpoint", "no.safetensors"], "not exist"),
        (["{photo}", "--checkpoint", "{folder}"], "has no config.json"),
        (["{photo}", "--checkpoint", "{run}"], "of a run name the folder of its weights"),
        (["{photo}", "--model", "test_vit"], "VisionTransformer does not route"),
        (["missing.jpg", "--model", "colt5_vit_test"], "missing.jpg cannot be read"),
        (["{text}", "--model", "colt5_vit_test"], "cannot be read as an image"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    photograph: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.png").write_text("not an image")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"config": {}}')
    places = {"photo": photograph, "folder": tmp_path, "run": run, "text": tmp_path / "text.png"}
    with pytest.raises(SystemExit) as stop:
        visualize.main([argument.format(**places) for argument in arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
