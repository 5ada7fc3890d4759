"""Encoder and decoder of Deformable DETR."""

import torch


def test_refinement_starts_from_the_layer_before_and_teaches_it_nothing(deformable, padded_batch):
    model = deformable("refine")
    predictions = model(*padded_batch((64, 64), canvas=(64, 64)))
    gradients = torch.autograd.grad(predictions.boxes.sum(), list(model.bbox_embed.parameters()), allow_unused=True)
    per_head = len(gradients) // 4
    assert all(gradient is None for gradient in gradients[:-per_head])
    assert all(gradient is not None for gradient in gradients[-per_head:])
