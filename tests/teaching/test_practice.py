"""Images are learned by heart."""

import torch

from detrlib.data import build_dataset, collate
from detrlib.losses import Criterion
from detrlib.models import build_model
from detrlib.teaching.practice import learn_by_heart


def test_a_batch_is_learned_by_heart(tiny_config):
    cfg = tiny_config({"model.backbone.weights": "none", "model.num_classes": 7})
    dataset = build_dataset(cfg.data, "val")
    batch = collate([dataset[0], dataset[1]])
    torch.manual_seed(0)
    model, criterion = build_model(cfg.model), Criterion(**dict(cfg.loss))
    totals = learn_by_heart(model, criterion, batch, steps=12, rate=2e-3)
    assert len(totals) == 12 and not model.training
    with torch.no_grad():
        loss, _ = criterion(model(batch.images, batch.padding_mask), batch.targets)
    assert loss < 0.8 * totals[0]
