"""What models return: maps as images, samples as maps, detections.

Legend: B images, H heads, Q queries, K = h x w cells of the feature map, C classes.
"""

import pytest
import torch

from detrlib.models import AttentionMaps, Predictions
from detrlib.models.outputs import cell_side


def numbered_maps() -> AttentionMaps:
    """Maps of 2 images, 1 head, 3 queries and a 2 x 4 grid; the second image is 1 x 3 cells."""
    cross = torch.arange(2 * 3 * 8.0).view(2, 1, 3, 8)
    padding = torch.zeros(2, 2, 4, dtype=torch.bool)
    padding[1, 1:] = padding[1, :, 3:] = True
    return AttentionMaps(
        [torch.arange(128.0).view(2, 1, 8, 8)], [torch.zeros(2, 1, 3, 3)], [cross], (2, 4), padding.flatten(1)
    )


@pytest.mark.parametrize(
    ("canvas", "grid", "side"),
    [((800, 1088), (25, 34), 32), ((800, 1066), (25, 34), 32), ((66, 66), (3, 3), 32), ((99, 57), (13, 8), 8)],
)
def test_cells_are_squares_of_the_stride(canvas, grid, side):
    """66 pixels are three cells of 32, the last of which hangs over, and not three of 22."""
    assert cell_side(canvas, grid) == side


def test_maps_as_images():
    maps = numbered_maps()
    images = maps.as_images("decoder_cross", 0)
    assert images.shape == (2, 1, 3, 2, 4)
    assert images[1, 0, 2, 1, 3] == maps.decoder_cross[0][1, 0, 2, 1 * 4 + 3]
    assert images[0, 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert maps.as_images("encoder_self", 0).shape == (2, 1, 8, 2, 4)
    with pytest.raises(ValueError, match="decoder_self"):
        maps.as_images("decoder_self", 0)


def test_valid_grid():
    assert [numbered_maps().valid_grid(image) for image in range(2)] == [(2, 4), (1, 3)]


def test_detections_with_softmax():
    logits = torch.tensor([[[3.0, 0.0, 1.0], [0.0, 1.0, 9.0], [0.0, 4.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1], [0.25, 0.75, 0.5, 0.5]]])
    found = Predictions(logits, boxes).detections(torch.tensor([[200, 100]]))[0]
    assert found.queries.tolist() == [2, 0, 1]
    assert found.labels.tolist() == [1, 0, 1]  # never no-object, however likely
    torch.testing.assert_close(found.boxes[0], torch.tensor([0.0, 100.0, 50.0, 200.0]))
    torch.testing.assert_close(found.boxes[1], torch.tensor([40.0, 60.0, 60.0, 140.0]))
    torch.testing.assert_close(found.scores[0], logits[0, 2].softmax(0)[1])
    assert len(Predictions(logits, boxes).detections(torch.tensor([[200, 100]]), limit=2)[0].scores) == 2


def test_detections_with_sigmoid():
    logits = torch.tensor([[[3.0, -9.0, 2.0], [0.0, -1.0, -9.0]], [[-5.0, -6.0, -9.0], [-9.0, 1.0, -4.0]]])
    boxes = torch.rand(2, 2, 4)
    first, second = Predictions(logits, boxes, "sigmoid").detections(torch.tensor([[10, 10], [20, 40]]), limit=3)
    assert (first.queries.tolist(), first.labels.tolist()) == ([0, 0, 1], [0, 2, 0])  # one query, two classes
    assert (second.queries.tolist(), second.labels.tolist()) == ([1, 1, 0], [1, 2, 0])
    torch.testing.assert_close(first.scores, torch.tensor([3.0, 2.0, 0.0]).sigmoid())
    corners = boxes[1, 1, :2] - boxes[1, 1, 2:] / 2
    torch.testing.assert_close(second.boxes[0, :2], corners * torch.tensor([40.0, 20.0]))
    everything = Predictions(logits, boxes, "sigmoid").detections(torch.tensor([[10, 10], [20, 40]]))
    assert [len(image.scores) for image in everything] == [6, 6]


def test_samples_as_maps(deformable, padded_batch):
    model = deformable("two-stage")
    images, padding = padded_batch((70, 101), (128, 64), canvas=(128, 160))
    with torch.no_grad():
        plain = model(images, padding)
        predictions = model(images, padding, need_attention=True)
    maps = predictions.attention
    assert plain.attention is None and maps.grid == (32, 40)
    torch.testing.assert_close(plain.logits, predictions.logits)
    assert torch.equal(maps.key_padding, padding[:, ::4, ::4].flatten(1))
    assert [len(maps.encoder_self), len(maps.decoder_self), len(maps.decoder_cross)] == [2, 4, 4]
    assert maps.encoder_self[1].shape == (2, 4, 32 * 40 + 16 * 20, 32 * 40)
    for layer in range(4):
        weights = maps.decoder_cross[layer]
        assert weights.shape == (2, 4, 7, 32 * 40) and (weights >= 0).all()
        assert (weights.sum(-1) < 1 + 1e-5).all() and weights.sum(-1).mean() > 0.5
        assert maps.as_images("decoder_cross", layer).shape == (2, 4, 7, 32, 40)
    points = maps.decoder_cross.sampling_locations(0)
    assert points.shape == (2, 7, 4, 2, 2, 2)
    only = model(images, padding, need_attention=["decoder_cross"]).attention
    assert only.encoder_self.samples == [None] * 2


def test_maps_have_their_mass_where_the_points_are(deformable, padded_batch):
    model = deformable("two-stage")
    images, padding = padded_batch((128, 64), canvas=(128, 160))
    with torch.no_grad():
        maps = model(images, padding, need_attention=True).attention.decoder_cross
    weights = maps.samples[0].weights.flatten(3)  # [B,Q,H,L*P]
    points = maps.sampling_locations(0).flatten(3, 4)
    inside = ((points > 0.1) & (points < 0.9)).all(-1).all(-1)[0]  # [Q,H]
    assert inside.any()
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(40) + 0.5, indexing="ij")
    images = maps[0].unflatten(-1, (32, 40))
    x = (images * columns).sum((-2, -1))[0].T[inside] / 16  # the image is 16 cells of 40 wide
    y = (images * rows).sum((-2, -1))[0].T[inside] / 32
    centre = (weights[..., None] * points).sum(-2)[0][inside]
    torch.testing.assert_close(torch.stack([x, y], -1), centre, rtol=0, atol=1e-4)
