"""Where attention lies: closed forms against enlarged maps, exact cases, and what must not matter."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from detrlib.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrlib.errors import ConfigError
from detrlib.metrics.localisation import MEASURES, locate, object_size, paibb


def random_maps(n: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed)) ** 4


def test_paibb_agrees_with_brute_force_enlargement():
    """An independent computation: enlarge the map 64 times and count pixels."""
    factor, (h, w), extent = 64, (5, 7), (4.5, 6.75)
    maps = random_maps(6, h, w)
    image = interpolate(maps[None].double(), (h * factor, w * factor), mode="bilinear")[0]
    rows, columns = int(extent[0] * factor), int(extent[1] * factor)  # the rest is beyond the image
    image = image[:, :rows, :columns]
    corners = torch.tensor(
        [[0, 0, 20, 30], [1, 250, 431, 287], [100, 90, 101, 91], [3, 3, 432, 288], [200, 7, 300, 8], [31, 33, 97, 160]]
    )
    boxes = xyxy_to_cxcywh(corners.double() / torch.tensor([columns, rows, columns, rows]))
    expected = [page[y0:y1, x0:x1].sum() / page.sum() for page, (x0, y0, x1, y1) in zip(image, corners, strict=True)]
    # The midpoint of a pixel is its mean: kinks of f lie between pixels where the factor is even.
    torch.testing.assert_close(paibb(maps, boxes, extent), torch.stack(expected).float(), rtol=1e-5, atol=1e-8)


def test_paibb_of_the_whole_image_and_beyond_is_one():
    maps = random_maps(2, 4, 6)
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.4, 0.6, 3.0, 3.0]])
    torch.testing.assert_close(paibb(maps, boxes, (3.2, 5.9)), torch.ones(2))


def test_paibb_of_uniform_attention_is_the_share_of_area():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.1, 0.9, 0.001, 0.002], [0.0, 0.0, 0.5, 0.5]])
    inside_image = torch.tensor([0.06, 2e-6, 0.0625])
    torch.testing.assert_close(paibb(torch.ones(3, 5, 8), boxes, (4.3, 8.0)), inside_image)


def test_paibb_adds_up_over_a_partition():
    cuts_x, cuts_y = [0, 0.13, 0.5001, 0.9, 1], [0, 0.333, 0.334, 1]
    corners = [(x0, y0, x1, y1) for x0, x1 in pairwise(cuts_x) for y0, y1 in pairwise(cuts_y)]
    maps = random_maps(1, 3, 9).expand(len(corners), -1, -1)
    shares = paibb(maps, xyxy_to_cxcywh(torch.tensor(corners)), (2.5, 8.25))
    assert shares.min() > 0
    assert shares.sum().item() == pytest.approx(1)


def test_paibb_of_degenerate_input():
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    assert paibb(torch.zeros(1, 3, 3), whole, (3, 3)).tolist() == [0]
    assert paibb(torch.ones(1, 3, 3), torch.tensor([[0.5, 0.5, 0.0, 1.0]]), (3, 3)).tolist() == [0]
    assert paibb(torch.ones(1, 1, 1), torch.tensor([[0.5, 0.5, 0.5, 0.2]]), (1, 1)).item() == pytest.approx(0.1)
    assert paibb(torch.zeros(0, 3, 3), torch.zeros(0, 4), (3, 3)).shape == (0,)
    with pytest.raises(ConfigError, match="does not fit"):
        paibb(torch.ones(1, 3, 3), whole, (3, 3.5))


@pytest.mark.parametrize(
    ("area", "size"),
    [(0, "small"), (1023.9, "small"), (1024, "medium"), (9216, "medium"), (9216.1, "large"), (1e6, "large")],
)
def test_object_size(area, size):
    assert object_size(area) == size


# The published procedure


def enlarged(maps: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """PAIBB of maps [n,h,w] by enlarging them to `size` and summing pixels of boxes cut to whole pixels."""
    height, width = size
    images = interpolate(maps[None], size, mode="bilinear")[0]
    corners = (cxcywh_to_xyxy(boxes) * torch.tensor([width, height, width, height])).int().tolist()
    return torch.stack(
        [image[y0:y1, x0:x1].sum() / image.sum() for image, (x0, y0, x1, y1) in zip(images, corners, strict=True)]
    )


def random_boxes(n: int, seed: int = 0) -> torch.Tensor:
    """cxcywh [n,4] inside the image, of all sizes."""
    corners = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(1).values
    return xyxy_to_cxcywh(corners.flatten(1))


@pytest.mark.parametrize(("grid", "size"), [((25, 34), (480, 640)), ((5, 3), (61, 33)), ((7, 9), (6, 8))])
def test_thesis_mode_is_the_published_procedure(grid, size):
    maps, boxes = random_maps(20, *grid), random_boxes(20)
    found = paibb(maps, boxes, grid, "thesis", torch.tensor([size]))
    torch.testing.assert_close(found, enlarged(maps, boxes, size), rtol=1e-5, atol=1e-6)
    exact = paibb(maps, boxes, grid)
    assert (found - exact).abs().max() > 1e-4  # truncation shows,
    if size[0] > 400:
        assert (found - exact).abs().max() < 0.02  # but not much in a photograph


def test_thesis_mode_in_a_batch_is_that_of_images_alone():
    """Images of two sizes; what lies beyond their cells must not matter."""
    grids, extents, sizes = [(4, 6), (5, 3)], [(3.4, 5.5), (4.9, 3.0)], [(50, 83), (97, 61)]
    maps, boxes = random_maps(2, 5, 6), random_boxes(2)
    found = paibb(maps, boxes, torch.tensor(extents), "thesis", torch.tensor(sizes))
    for i, (h, w) in enumerate(grids):
        alone = enlarged(maps[i : i + 1, :h, :w], boxes[i : i + 1], sizes[i])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_thesis_mode_needs_pixels_and_gives_a_small_box_none():
    box = torch.tensor([[0.503, 0.5, 0.004, 0.5]])  # between two pixels of 100
    assert paibb(torch.ones(1, 3, 3), box, (3, 3), "thesis", torch.tensor([[100, 100]])).item() == 0
    assert paibb(torch.ones(1, 3, 3), box, (3, 3)).item() == pytest.approx(0.002)
    with pytest.raises(ConfigError, match="original_size is needed"):
        paibb(torch.ones(1, 3, 3), box, (3, 3), "thesis")


# All measures


@pytest.mark.parametrize("mode", ["exact", "thesis"])
def test_batches_layers_and_heads_are_those_of_single_maps(mode):
    """Padding around an image must not matter either, whatever weights it has."""
    maps, boxes = random_maps(4 * 2 * 3, 6, 7).view(4, 2, 3, 6, 7), random_boxes(4)
    extents = torch.tensor([[6.0, 7.0], [4.5, 6.2], [3.6, 7.0], [5.0, 2.5]])
    sizes = torch.tensor([[60, 70], [90, 124], [36, 70], [50, 25]])
    together = locate(maps, boxes, extents, mode, sizes)
    assert tuple(together) == MEASURES
    for i, layer, head in np.ndindex(4, 2, 3):
        h, w = extents[i].ceil().int().tolist()
        one = maps[i, layer, head, :h, :w][None]
        alone = locate(one, boxes[i : i + 1], tuple(extents[i].tolist()), mode, sizes[i : i + 1])
        for name in MEASURES:
            torch.testing.assert_close(together[name][i, layer, head], alone[name][0], msg=name)
    torch.testing.assert_close(together["paibb"], paibb(maps, boxes, extents, mode, sizes))


def test_normalised_paibb_of_uniform_attention_is_one():
    boxes = random_boxes(6)
    found = locate(torch.ones(6, 4, 5), boxes, (3.5, 5.0))
    torch.testing.assert_close(found["paibb_normalised"], torch.ones(6))
    torch.testing.assert_close(found["paibb"], boxes[:, 2:].prod(-1))
    point = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert locate(torch.ones(1, 4, 5), point, (4, 5))["paibb_normalised"].item() == 0


def test_centre_of_mass_agrees_with_enlargement():
    """The mean place of the pixels of a map enlarged 64 times, of the image alone."""
    factor, (h, w), extent = 64, (5, 7), (4.5, 6.75)
    maps, boxes = random_maps(8, h, w), random_boxes(8)
    image = interpolate(maps[None].double(), (h * factor, w * factor), mode="bilinear")[0]
    image = image[:, : int(extent[0] * factor), : int(extent[1] * factor)]
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in image.shape[1:])
    mass = torch.stack([(image.sum(1) * x).sum(-1), (image.sum(2) * y).sum(-1)], -1) / image.sum((1, 2))[:, None]
    pixels = boxes.double() * torch.tensor(image.shape[1:]).flip(0).repeat(2)
    expected = (mass - pixels[:, :2]).norm(dim=-1) / pixels[:, 2:].norm(dim=-1)
    torch.testing.assert_close(locate(maps, boxes, extent)["distance"], expected.float(), rtol=1e-4, atol=1e-5)


def test_distance_of_known_maps():
    """Even attention sits in the middle of the image: half a diagonal from a box whose corner is there."""
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.25, 0.25, 0.5, 0.5], [0.75, 0.5, 0.1, 0.0]])
    found = locate(torch.ones(3, 4, 8), boxes, (3.7, 8.0))["distance"]
    assert found.tolist() == pytest.approx([0, 0.5, 2.5], abs=1e-6)


def test_without_attention_there_is_no_place():
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    found = locate(torch.zeros(1, 3, 3), whole, (3, 3))
    assert [found[name].item() for name in MEASURES[:3]] == [0, 0, 0]
    assert found["distance"].isnan().all()
    assert locate(torch.ones(1, 3, 3), torch.tensor([[0.5, 0.5, 0.0, 0.0]]), (3, 3))["distance"].isnan().all()


def pointing(cells: list[list[float]], box: list[float], extent=None) -> float:
    """box: corners (x0, y0, x1, y1) in cells."""
    maps = torch.tensor([cells])
    extent = extent or tuple(maps.shape[1:])
    corners = torch.tensor([box]) / torch.tensor([extent[1], extent[0]] * 2)
    return locate(maps, xyxy_to_cxcywh(corners), extent)["pointing"].item()


def test_pointing_game():
    cells = [[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]]  # the maximum is at x 1.5, y 1.5
    assert pointing(cells, [1, 1, 2, 2]) == 1
    assert pointing(cells, [1.5, 1.5, 3, 2]) == 1  # on the corner
    assert pointing(cells, [1.6, 0, 3, 2]) == 0
    assert pointing(cells, [0, 0, 3, 1.4]) == 0
    ties = [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert pointing(ties, [0, 0, 1, 2]) == pytest.approx(2 / 3)
    assert pointing([[1.0, 1.0], [1.0, 1.0]], [0, 0, 1, 1]) == 0.25


def test_pointing_stays_in_the_image():
    """The last column has its centre past the edge, at 2.5 of 2.3; the one after it is padding."""
    cells = [[0.0, 1.0, 2.0, 9.0]]
    assert pointing(cells, [2.2, 0, 2.3, 1], (1.0, 2.3)) == 1
    assert pointing(cells, [1.0, 0, 2.1, 1], (1.0, 2.3)) == 0


def test_maximum_of_the_interpolation_is_at_the_largest_cell():
    maps, boxes = random_maps(60, 4, 5), random_boxes(60)
    maps[:, [0, -1]] = maps[:, :, [0, -1]] = 0  # from the largest cell to the edge of the image, f would be constant
    image = interpolate(maps[None], (4 * 33, 5 * 33), mode="bilinear")[0]  # odd: centres of cells are pixels
    place = image.flatten(1).argmax(1)
    y, x = (torch.div(place, 165, rounding_mode="floor") + 0.5) / 132, (place % 165 + 0.5) / 165
    corners = cxcywh_to_xyxy(boxes)
    hit = (x >= corners[:, 0]) & (x <= corners[:, 2]) & (y >= corners[:, 1]) & (y <= corners[:, 3])
    assert torch.equal(locate(maps, boxes, (4, 5))["pointing"], hit.float())
    assert 0 < hit.float().mean() < 1
