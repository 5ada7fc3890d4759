"""Detection transformers: `build_model(settings)` makes one, `Predictions` is what it returns.

backbone (swin, pretrained), position           from images to maps of features, and where their cells are
transformer, detr, pnp                          DETR: encoder and decoder, the model, fewer tokens than cells
pyramid, deformable_layers, deformable, sparse  Deformable DETR: several levels, its layers, the model, fewer tokens
huggingface (_attention, _weights)              detectors of transformers, and our transforms inside them
outputs, build, checkpointing                   what models return, from settings to a model, memory for time
"""

from detrlib.models.build import (
    alpha_modules,
    backbone_view,
    build_model,
    sampling_projections,
    set_alphas,
    transform_modules,
    transform_settings,
)
from detrlib.models.checkpointing import checkpoint_activations
from detrlib.models.outputs import AttentionMaps, Detections, Predictions
