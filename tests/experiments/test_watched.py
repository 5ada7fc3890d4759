"""What is counted at a transform in use: keys without padding, points as they are weighed, scores of a given spread."""

import pytest
import torch

from detrlib.attention import build_transform
from detrlib.experiments.watched import Watched, watched
from detrlib.models.huggingface_attention import use

pytest.importorskip("transformers")
IMAGE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def test_padding_is_no_key(huggingface_detector):
    model, mask = huggingface_detector("detr"), torch.ones(1, 128, 128, dtype=torch.long)
    mask[:, :, 64:] = 0
    with torch.no_grad(), use("softmax", model), watched(model, ["encoder_self", "decoder_cross"]) as at_sites:
        model(pixel_values=IMAGE, pixel_mask=mask)
    assert [one.means() for layers in at_sites.values() for one in layers] == [{"keys": 8.0}] * 4


def test_batches_count_by_their_images():
    one, generator = Watched(build_transform("sparsemax", 2), None, points=True), torch.Generator().manual_seed(0)
    scores = torch.randn(5, 2, 3, 7, generator=generator)
    one(scores[:4])
    one(scores[4:])
    weights = one.inner(scores)
    assert one.means()["keys"] == 7
    assert one.means()["zeros"] == pytest.approx((weights == 0).float().mean().item(), abs=1e-6)


def test_scores_get_a_spread_that_their_scale_does_not_change():
    one = Watched(build_transform("sparsemax", 2), 2.0, points=False)
    scores = torch.randn(1, 2, 3, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one(scores), one(7 * scores + 3))
    assert (one(scores) == 0).sum() > (Watched(one.inner, 0.1, points=False)(scores) == 0).sum()


def test_modules_have_their_transforms_back(huggingface_detector):
    model = huggingface_detector("rt_detr_v2")
    with use("entmax15", model):
        before = [module.transform for module in model.modules() if hasattr(module, "transform")]
        with pytest.raises(ZeroDivisionError), watched(model, ["decoder_cross", "decoder_self"]):
            raise ZeroDivisionError
        after = [module.transform for module in model.modules() if hasattr(module, "transform")]
    assert all(one is other for one, other in zip(before, after, strict=True))
