"""From feature maps to tokens of several levels.

Legend: B images, L levels, S tokens of all levels.
"""

import torch

from detrlib.models.backbone import FeatureMap
from detrlib.models.position import SinePosition
from detrlib.models.pyramid import LevelProjections, cell_centres, flattened, over_levels


def test_group_norm_of_what_is_image_is_torchs():
    torch.manual_seed(0)
    projections = LevelProjections([6], 2, 16)
    features = torch.randn(2, 6, 9, 11)
    padding = torch.ones(2, 9, 11, dtype=torch.bool)
    padding[0, :, :] = padding[1, :5, :7] = False
    features = features.masked_fill(padding[:, None], 0.0)
    first, second = projections([FeatureMap(features, padding)])
    assert second.features.shape == (2, 16, 5, 6)
    assert torch.equal(second.padding, padding[:, ::2, ::2])
    expected = projections[0](features[1:, :, :5, :7])
    torch.testing.assert_close(first.features[1:, :, :5, :7], expected)
    torch.testing.assert_close(first.features[:1], projections[0](features[:1]))
    assert (first.features[1, :, 5:] == 0).all() and (second.features[1, :, 3:] == 0).all()


def test_tokens_lie_at_the_centres_of_their_cells(half_padded, pyramid_of):
    pyramid = pyramid_of(half_padded(), half_padded()[:, ::2, ::2])
    centres = cell_centres(pyramid)
    assert centres.shape == (2, 32 + 8, 2)
    torch.testing.assert_close(centres[0, 9], torch.tensor([1.5 / 8, 1.5 / 4]))
    torch.testing.assert_close(centres[1, 9], torch.tensor([1.5 / 4, 1.5 / 3]))
    torch.testing.assert_close(centres[1, 32 + 1], torch.tensor([1.5 / 2, 0.5 / 2]))
    on_levels = over_levels(centres, pyramid.ratios)  # a token's place on its own level counts padding
    torch.testing.assert_close(on_levels[1, 9, 0], torch.tensor([1.5 / 8, 1.5 / 4]))
    torch.testing.assert_close(on_levels[1, 9, 1], torch.tensor([1.5 / 4 * 2 / 4, 1.5 / 3 * 2 / 2]))
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(2, 1, 4)
    torch.testing.assert_close(over_levels(boxes, pyramid.ratios)[1, 0, 0], torch.tensor([0.25, 0.375, 0.1, 0.3]))


def test_positions_tell_levels_apart(half_padded, pyramid_of):
    pyramid = pyramid_of(half_padded(), half_padded()[:, ::2, ::2])
    plain = SinePosition(8, centred=True)(half_padded()[:, ::2, ::2]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pyramid.position[:, 32:], plain + torch.arange(8.0, 16.0))
    unpadded = [FeatureMap(torch.zeros(2, 8, 4, 8), None)]
    alike = flattened(unpadded, SinePosition(8, centred=True), torch.zeros(1, 8))
    assert alike.padding is None and alike.position.shape == (1, 32, 8)
