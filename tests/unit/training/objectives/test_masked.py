"""Masked autoencoding: what is computed, what is predicted, what is refused."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.config.run import ConfigError
from routedvit.training.objectives import MaskedObjective
from routedvit.training.watch.reconstruction import ReconstructionMonitor


def objective(model: dict[str, Any] | None = None, **kwargs: Any) -> MaskedObjective:
    torch.manual_seed(0)
    arguments = {"img_size": (24, 32), "patch_size": 4, "num_classes": 0, "depth": 2}
    encoder = timm.create_model("colt5_vit_test", **{**arguments, **(model or {})})
    small = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    return MaskedObjective(encoder, **{**small, **kwargs})


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 24, 32, generator=generator), torch.zeros(size), torch.arange(size)


def test_patches_and_pictures_are_inverse() -> None:
    image = batch()[0]
    for norm_pixels in (True, False):
        masked = objective(norm_pixels=norm_pixels)
        torch.testing.assert_close(masked.picture(image, masked.pixels(image)), image)
    patch = masked.patches(image)[1, 9]  # row 1, column 1 of the 6 x 8 grid
    assert torch.equal(patch.view(3, 4, 4), image[1, :, 4:8, 4:8])


def test_normalised_pixels_have_mean_0_and_deviation_1_in_each_patch() -> None:
    pixels = objective().pixels(batch()[0])
    torch.testing.assert_close(pixels.mean(2), torch.zeros(4, 48), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(2), torch.ones(4, 48), atol=1e-4, rtol=0)


def test_the_loss_is_the_squared_error_on_hidden_patches_alone() -> None:
    masked, (image, target, position) = objective().eval(), batch()
    predictions: list[Tensor] = []
    masked.decoder.register_forward_hook(lambda _, __, out: predictions.append(out))
    loss, metrics = masked(image, target, position)
    visible = masked.visible(position, (6, 8))
    assert visible.shape == (4, 12)
    errors = []
    for row in range(4):
        hidden = [n for n in range(48) if n not in visible[row]]
        errors.append(F.mse_loss(predictions[0][row, hidden], masked.pixels(image)[row, hidden]))
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    assert metrics == {}


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    masked, (image, target, position) = objective(norm_pixels=False).eval(), batch()
    predictions: list[Tensor] = []
    masked.decoder.register_forward_hook(lambda _, __, out: predictions.append(out))
    shown = torch.zeros(4, 48).scatter_(1, masked.visible(position, (6, 8)), 1).view(4, 1, 6, 8)
    shown = shown.repeat_interleave(4, 2).repeat_interleave(4, 3)
    masked(image, target, position)
    masked(torch.where(shown > 0, image, 7.0), target, position)
    torch.testing.assert_close(*predictions)


def test_the_loss_of_a_sample_depends_on_its_position_and_not_on_its_batch() -> None:
    masked, (image, target, position) = objective().eval(), batch()
    whole = masked(image, target, position)[0]
    single = [masked(image[i : i + 1], target, position[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(single).mean())
    assert masked(image, target, position + 100)[0] != whole


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"global_pool": "token"},
        {"class_token": False, "reg_tokens": 0},
        {"rope": True, "pos_embed": "none", "init_values": None},
        {"kv_routes": 2, "null_token": True, "null_kv": True},
        {"dynamic_img_size": True},
    ],
)
def test_every_parameter_has_a_gradient(model: dict[str, Any]) -> None:
    """ZeRO-3 would apply the last gradient of an idle one again."""
    masked = objective(model)
    masked(*batch())[0].backward()
    assert not [name for name, p in masked.named_parameters() if p.grad is None]


def test_the_encoder_computes_visible_patches_only() -> None:
    masked = objective(mask_ratio=0.5)
    seen: list[int] = []
    for block in masked.model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    masked(*batch())
    assert seen == [24 + 2] * 2  # half of 48, and two prefix tokens


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for policy in ("none", "block", "heavy"):
        masked = objective()
        masked.model.set_grad_checkpointing(policy != "none", policy=policy)
        masked(*batch())[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in masked.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_the_loss_is_fp32_for_a_low_precision_model() -> None:
    loss, _ = objective().bfloat16()(*batch())
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_classes": 5}, "model.kwargs.num_classes = 5"),
        ({"global_pool": "map"}, "global_pool = 'map'"),
    ],
)
def test_parts_that_no_loss_would_reach_are_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        objective(model)


def test_a_model_that_cannot_encode_a_subset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"VisionTransformer cannot, colt5_vit_\* can"):
        MaskedObjective(timm.create_model("test_vit", num_classes=0))


def test_it_learns_to_tell_hidden_patches_from_visible_ones() -> None:
    """Each image has one colour: the error falls far below the colours' variance of 1."""
    small = {"img_size": 16, "depth": 1, "init_values": None}
    masked = objective(small, norm_pixels=False, mask_ratio=0.5)
    optimizer = torch.optim.AdamW(masked.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        image = torch.randn(32, 3, 1, 1, generator=generator).expand(-1, -1, 16, 16)
        position = torch.arange(32) + 32 * step
        loss, _ = masked(image, position, position)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


class Recorder:
    def __init__(self) -> None:
        self.images: dict[str, Tensor] = {}

    def image(self, name: str, image: Tensor, step: int) -> None:
        self.images[f"{name} {step}"] = image


def test_a_picture_shows_image_mask_and_reconstruction() -> None:
    masked, writer = objective().train(), Recorder()
    probe = batch(2)[0]
    runs: list[int] = []

    class Other(nn.Module):
        def run(self, model: nn.Module, step: int) -> None:
            runs.append(step)

    monitor = ReconstructionMonitor(
        masked,
        probe,
        writer,
        mean=[0.5] * 3,
        std=[0.2] * 3,
        also=Other(),  # type: ignore[arg-type]
    )
    monitor.run(masked.model, 7)
    (sheet,) = writer.images.values()
    assert list(writer.images) == ["reconstruction 7"]
    assert sheet.dtype == torch.uint8
    assert sheet.shape[0] == 3
    assert len(sheet.flatten(1).unique(dim=1).T) > 100
    assert runs == [7]
    assert masked.training
    assert not masked.decoder._forward_hooks
