"""Windows cover the grid, keep raster order and come back as they went."""

import pytest
import torch

from routedvit.ops import merge_windows, partition_windows, window_padding_mask

GRIDS = [(4, 4, 2), (4, 6, 2), (5, 7, 3), (7, 7, 4), (1, 1, 3), (3, 8, 8)]


@pytest.mark.parametrize(("height", "width", "window"), GRIDS)
def test_merge_undoes_partition(height, width, window):
    x = torch.randn(2, height * width, 3)
    assert torch.equal(
        merge_windows(partition_windows(x, height, width, window), height, width, window), x
    )


@pytest.mark.parametrize(("height", "width", "window"), GRIDS)
def test_every_token_is_in_its_window_and_the_rest_is_masked(height, width, window):
    tokens = torch.arange(1.0, height * width + 1).view(1, -1, 1)
    windows = partition_windows(tokens, height, width, window)[..., 0]
    mask = window_padding_mask(1, height, width, window, tokens.device)[:, 0, 0]
    columns = -(-width // window)
    for row in range(height):
        for column in range(width):
            which = row // window * columns + column // window
            place = row % window * window + column % window
            assert windows[which, place] == row * width + column + 1
            assert mask[which, place]
    assert (windows[~mask] == 0).all()
    assert mask.sum() == height * width
    assert mask.any(-1).all()  # no window without a key
