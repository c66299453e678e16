"""Images that travelled as bytes become the normalised ones."""

import torch

from routedvit.training.images import as_floats


def test_bytes_are_normalised_per_channel():
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    levels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    batch = {
        "image": levels,
        "scale": (1 / (255 * std)).view(3, 1, 1),
        "shift": (mean / std).view(3, 1, 1),
    }
    found = as_floats(batch)
    assert found.dtype == torch.float32
    expected = (levels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(found, expected)
    assert batch["image"] is levels


def test_floats_stay_what_they_are():
    images = torch.randn(2, 3, 4, 4)
    assert as_floats({"image": images}) is images
