"""Detection transformers: `build_model(settings)` makes one, `Predictions` is what it returns."""

from detrlib.models.build import alpha_modules, backbone_view, build_model, sampling_projections, set_alphas
from detrlib.models.checkpointing import checkpoint_activations
from detrlib.models.outputs import AttentionMaps, Detections, Predictions
