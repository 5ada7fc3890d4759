"""Gradients and ODAM against differences of two runs of the model, which need no autograd.

Legend: n detections, h x w cells, K tokens.
"""

import pytest
import torch
from torch import nn

from detrlib.config import load_config
from detrlib.config.huggingface import KINDS
from detrlib.errors import ModelError
from detrlib.experiments.gradients import box_targets, odam, odam_sums, saliency, score_targets
from detrlib.models import build_model

QUERY, LABEL, STEP = torch.tensor([2]), torch.tensor([1]), 1e-5
OWN = {
    "detr": {},
    "no encoder": {"encoder_layers": 0, "norm": "pre", "classification": "sigmoid"},
    "conditional": {"queries": "conditional", "attention": {"decoder_cross": "sparsemax"}},
    "deformable": {"architecture": "deformable", "encoder_layers": 1, "decoder_layers": 1, "classification": "sigmoid"},
}
# Boxes and contents of their queries come from the memory by ways that no gradient goes.
PROPOSING = ("rt_detr", "rt_detr_v2", "d_fine")


@pytest.fixture
def scaled_encoder():
    """A function that multiplies what the encoder of a model returns by something, and gives the hook that does so."""

    def scaled_encoder(model: nn.Module, factors):
        def scale(_, __, output):
            if isinstance(output, tuple):  # this library's: a memory with tokens, and more
                return output[0]._replace(tokens=output[0].tokens * factors), *output[1:]
            states = output.last_hidden_state
            output.last_hidden_state = [x * factors for x in states] if isinstance(states, list) else states * factors
            return output

        name = "model.model.encoder" if hasattr(model, "model") else "transformer.encoder"
        return model.get_submodule(name).register_forward_hook(scale)

    return scaled_encoder


def log_scores(model, images, padding=None):
    """[B], of the query in each image."""
    with torch.no_grad():
        predictions = model(images, padding)
    logits = predictions.logits[:, QUERY[0]]
    softmax = predictions.classification == "softmax"
    return (logits.log_softmax(-1) if softmax else nn.functional.logsigmoid(logits))[:, LABEL[0]]


def predicted(model, images, padding=None):
    images = images.clone().requires_grad_()
    return images, model(images, padding, need_attention=("decoder_cross",))


@pytest.mark.parametrize("settings", OWN.values(), ids=OWN)
def test_what_each_cell_adds_is_the_difference_that_its_tokens_make(settings, small, padded_batch, scaled_encoder):
    model, (images, padding) = small(**settings).double(), padded_batch((24, 32), canvas=(32, 32))
    images = images.double()
    _, predictions = predicted(model, images, padding)
    attention = predictions.attention
    sums = odam_sums(score_targets(predictions, QUERY, LABEL)[0, 0], attention)
    count = attention.encoded.tensors[0].shape[1]
    steps = STEP * torch.eye(count).double()
    hook = scaled_encoder(model, 1 + torch.cat([steps, -steps])[..., None])
    ends = log_scores(model, images.expand(2 * count, -1, -1, -1), padding.expand(2 * count, -1, -1))
    hook.remove()
    changes = (ends[:count] - ends[count:]) / (2 * STEP)
    expected, first = torch.zeros(4, 4).double(), 0
    for (h, w), (side, _) in zip(attention.encoded.shapes, attention.encoded.sides, strict=True):
        for number, change in enumerate(changes[first : first + h * w]):
            row, column = number // w * side, number % w * side
            area = expected[row : min(row + side, 3), column : column + side]  # the last row is padding
            area += change / max(area.numel(), 1)
        first += h * w
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(sums, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    (found,) = odam(score_targets(predictions, QUERY, LABEL), attention)
    torch.testing.assert_close(found, sums.clamp(min=0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_detectors_of_transformers_say_their_decoder_looks_at_is_so(kind, huggingface_settings, scaled_encoder):
    torch.manual_seed(0)
    model = build_model(load_config(overrides=huggingface_settings(kind)).model).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, 0.2)
    images, step = torch.randn(1, 3, 64, 96), 1e-2
    seen = []
    model.model.model.encoder.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))
    _, predictions = predicted(model, images)
    score = score_targets(predictions, QUERY, LABEL)[0, 0]
    sums = odam_sums(score, predictions.attention)
    assert sums.shape == predictions.attention.grid
    states = seen[0] if isinstance(seen[0], list) else seen[:1]
    total = sum((g * x).sum() for g, x in zip(torch.autograd.grad(score, states), states, strict=True))
    torch.testing.assert_close(sums.sum(), total, rtol=1e-3, atol=1e-5)
    if kind not in PROPOSING:
        ends = []
        for sign in (1, -1):
            hook = scaled_encoder(model, 1 + sign * step)
            ends.append(log_scores(model, images).item())
            hook.remove()
        assert sums.sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.05, abs=1e-3)


def test_gradients_of_pixels_against_differences(small):
    model, images = small(encoder_layers=1, decoder_layers=1).double(), torch.randn(1, 3, 16, 24).double()
    images_of, predictions = predicted(model, images)
    found = saliency(score_targets(predictions, QUERY, LABEL), images_of, (16, 24), (2, 3))[0]
    steps = torch.zeros(192, 3, 16, 24).double()
    steps[:, :, 8:, 16:] = STEP * torch.eye(192).double().view(192, 3, 8, 8)  # the pixels of the last cell
    scores = [log_scores(model, images + sign * steps) for sign in (1, -1)]
    gradient = ((scores[0] - scores[1]) / (2 * STEP)).view(3, 64)
    assert found[1, 2].item() == pytest.approx(gradient.abs().amax(0).mean().item(), rel=1e-4)


def test_several_targets_are_scaled_and_the_highest_taken(small, padded_batch):
    images, padding = padded_batch((64, 48), canvas=(64, 64))
    _, predictions = predicted(small(), images, padding)
    queries, labels = torch.tensor([2, 5]), torch.tensor([1, 0])
    targets = torch.cat([score_targets(predictions, queries, labels), box_targets(predictions, queries)], 1)
    cx, cy, w, h = predictions.boxes[0, 2].tolist()
    assert targets[0, 1:].tolist() == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], abs=1e-6)
    found = odam(targets, predictions.attention)
    for n in range(2):
        own = torch.stack([odam(targets[n : n + 1, t : t + 1], predictions.attention)[0] for t in range(5)])
        assert found[n].max() == pytest.approx(1.0)
        torch.testing.assert_close(found[n], (own / own.amax((1, 2), keepdim=True)).amax(0))


@pytest.mark.parametrize("classification", ["softmax", "sigmoid"])
def test_the_gradient_of_the_logarithm_is_that_of_the_score_but_for_its_size(classification, small):
    images, predictions = predicted(small(classification=classification), torch.randn(1, 3, 32, 32))
    score = predictions.class_scores()[0, QUERY, LABEL].sum()
    direct = torch.autograd.grad(score, images, retain_graph=True)[0]
    log = torch.autograd.grad(score_targets(predictions, QUERY, LABEL).sum(), images)[0]
    torch.testing.assert_close(log * score.detach(), direct, rtol=1e-3, atol=1e-6)


def test_targets_that_do_not_depend_on_the_memory_are_refused(small):
    _, predictions = predicted(small(), torch.randn(1, 3, 32, 32))
    with pytest.raises(ModelError, match="decoder looks at"):
        odam_sums(torch.zeros((), requires_grad=True) * 2, predictions.attention)
