"""What a person reads from a routing picture must be what the router chose."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from routedvit import drawing


class Routing(NamedTuple):
    indices: Tensor
    gates: Tensor
    grid: tuple[int, int]


def random_routing(batch: int, grid: tuple[int, int], k: int, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, grid[0] * grid[1], generator=generator)
    indices = scores.topk(k).indices.sort(1).values
    return Routing(indices, torch.rand(batch, k, generator=generator), grid)


def test_denormalize_inverts_the_normalisation_and_makes_grey_rgb() -> None:
    pixels = torch.arange(256).float().view(1, 1, 16, 16)
    images = (pixels / 255 - 0.3) / 0.2
    restored = drawing.denormalize(images, [0.3], [0.2])
    assert restored.dtype == torch.uint8
    assert torch.equal(restored.float(), pixels.expand(1, 3, 16, 16))


def test_denormalize_uses_each_channels_own_mean_and_std() -> None:
    images = torch.zeros(1, 3, 2, 2)
    restored = drawing.denormalize(images, [0.0, 0.5, 1.0], [1.0, 1.0, 1.0])
    assert restored[0, :, 0, 0].tolist() == [0, 128, 255]


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    image = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    fitted = drawing.fit(image, (7, 7), 140)
    assert fitted.shape == (3, 140, 140)
    assert torch.equal(fitted[:, ::5, ::5], image)


@pytest.mark.parametrize("shape", [(224, 224), (50, 93), (400, 300)])
@pytest.mark.parametrize("grid", [(14, 14), (5, 9)])
def test_fitted_sides_are_whole_patches(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    fitted = drawing.fit(torch.zeros(3, *shape, dtype=torch.uint8), grid, 128)
    assert fitted.shape[1] % grid[0] == 0
    assert fitted.shape[2] % grid[1] == 0


def test_selected_patches_alone_are_tinted() -> None:
    grid = (2, 3)
    routing = Routing(torch.tensor([[1, 3]]), torch.tensor([[0.2, 1.0]]), grid)
    grey = torch.full((3, 20, 30), 128, dtype=torch.uint8)
    picture = drawing.highlight(grey, drawing.gate_map(routing, 0), (255, 0, 0))
    centre = picture[:, 5::10, 5::10]
    redness = centre[0] - centre[2]
    assert (redness > 0).tolist() == [[False, True, False], [True, False, False]]


def test_the_tint_grows_with_the_gate() -> None:
    gates = torch.tensor([[0.1, 0.5, 1.0]])
    picture = drawing.highlight(torch.full((3, 10, 30), 128, dtype=torch.uint8), gates, (255, 0, 0))
    red = picture[0, 5, 5::10].tolist()
    assert red == sorted(red)
    assert red[2] > red[0] + 20


@pytest.mark.parametrize("value", [0, 255])
def test_the_selection_shows_on_black_and_on_white(value: int) -> None:
    gates = torch.tensor([[float("nan"), 1.0]])
    flat = torch.full((3, 10, 20), value, dtype=torch.uint8)
    picture = drawing.highlight(flat, gates, drawing.TINTS["ffn"])
    assert (picture[:, 5, 5] - picture[:, 5, 15]).abs().max() > 40


def test_the_outline_encloses_a_region_without_inner_lines() -> None:
    gates = torch.tensor([[1.0, 1.0, float("nan")]])
    black = torch.zeros(3, 12, 36, dtype=torch.uint8)
    picture = drawing.highlight(black, gates, (255, 0, 0))
    line = picture[0, 6] == 255
    assert line.nonzero().flatten().tolist() == [0, 23]


def test_a_sheet_has_a_row_per_image_and_a_column_per_block() -> None:
    def size(batch: int, blocks: int) -> tuple[int, int]:
        images = torch.zeros(batch, 3, 28, 28, dtype=torch.uint8)
        routing = {f"blocks.{i}.ffn": random_routing(batch, (7, 7), 9) for i in range(blocks)}
        sheet = drawing.routing_sheet(images, routing)
        assert sheet.dtype == torch.uint8
        return sheet.shape[1], sheet.shape[2]

    height, width = size(2, 3)
    assert size(3, 3) == (height + 145, width)
    assert size(2, 4) == (height, width + 145)


def test_deep_models_are_thinned_to_max_blocks() -> None:
    images = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    routing = {f"blocks.{i}.q": random_routing(1, (7, 7), 9) for i in range(32)}
    twelve = {f"blocks.{i}.q": random_routing(1, (7, 7), 9) for i in range(12)}
    deep = drawing.routing_sheet(images, routing, router="q", max_blocks=12)
    assert deep.shape == drawing.routing_sheet(images, twelve, router="q").shape


def test_wide_grids_and_blocks_with_other_grids_fit_into_one_sheet() -> None:
    images = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    routing = {
        "blocks.0.kv0": random_routing(1, (4, 8), 9),
        "blocks.1.kv0": random_routing(1, (3, 5), 4),
    }
    sheet = drawing.routing_sheet(images, routing, router="kv0", title="step 1")
    assert sheet.shape[0] == 3


def test_an_unknown_router_is_answered_with_those_there_are() -> None:
    images = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    routing = {"blocks.0.q": random_routing(1, (7, 7), 9)}
    with pytest.raises(ValueError, match=r"router='ffn' is not in this model; it has q"):
        drawing.routing_sheet(images, routing)


def test_kv_routes_share_a_kind() -> None:
    assert [drawing.router_kind(name) for name in ("ffn", "q", "kv0", "kv1")] == [
        "ffn", "q", "kv", "kv",
    ]  # fmt: skip


def test_a_reconstruction_sheet_shows_true_patches_where_they_were_visible() -> None:
    """White images, black predictions, the left half visible: columns are full, half, half."""
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    visible = torch.tensor([[0, 2], [0, 2]])
    sheet = drawing.reconstruction_sheet(images, images * 0, visible, (2, 2), title="step 3")
    assert sheet.dtype == torch.uint8
    white = (sheet == 255).all(0).sum(1).max().item()  # in one row of pixels
    tile = 140 // 8 * 8
    assert white == tile + tile // 2 + tile // 2
    assert (sheet == 0).all(0).any()
