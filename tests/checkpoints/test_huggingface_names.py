"""Names of Hugging Face's layout and official ones, both ways."""

import pytest

from detrlib.checkpoints.files import export_official
from detrlib.checkpoints.huggingface_names import OLDER, pairs_of, translated

CASES = [
    ("detr", "model.decoder.layers.10.encoder_attn_layer_norm.bias", "transformer.decoder.layers.10.norm2.bias"),
    ("deformable", "model.decoder.layers.10.encoder_attn_layer_norm.bias", "transformer.decoder.layers.10.norm1.bias"),
    (
        "detr",
        "model.decoder.layers.3.encoder_attn.q_proj.weight",
        "transformer.decoder.layers.3.multihead_attn.q_proj.weight",
    ),
    ("detr", "class_labels_classifier.weight", "class_embed.weight"),
    (
        "conditional",
        "model.decoder.layers.1.encoder_attn.out_proj.bias",
        "transformer.decoder.layers.1.cross_attn.out_proj.bias",
    ),
    ("deformable", "class_embed.5.weight", "class_embed.5.weight"),
    ("deformable", "model.level_embed", "transformer.level_embed"),
    (
        "detr",
        "model.backbone.conv_encoder.model.encoder.stages.2.layers.11.layer.1.normalization.running_var",
        "backbone.0.body.layer3.11.bn2.running_var",
    ),
]


@pytest.mark.parametrize(("family", "theirs", "official"), CASES)
def test_names_are_translated_both_ways(family, theirs, official):
    pairs = pairs_of(family)
    assert translated(theirs, pairs) == official
    assert translated(official, [(after, before) for before, after in pairs]) == theirs


def test_every_name_of_a_model_comes_back(every_small):
    model, _ = every_small
    state = export_official(model)
    conditional = "transformer.decoder.ref_point_head.layers.0.weight" in state
    pairs = pairs_of("deformable" if hasattr(model, "two_stage") else "conditional" if conditional else "detr")
    for name in state:
        theirs = translated(name, [(after, before) for before, after in pairs])
        assert translated(theirs, pairs) == name
        assert not theirs.startswith(("transformer.", "backbone."))


def test_names_of_older_versions_and_of_timm():
    older = "model.backbone.position_embedding.row_embeddings.weight"
    assert translated(translated(older, OLDER), pairs_of("detr")) == "backbone.1.row_embed.weight"
    for part in ("", "_backbone."):
        name = f"model.backbone.conv_encoder.model.{part}layer1.0.conv1.weight"
        assert (
            translated(translated(name, OLDER), pairs_of("detr", resnet=False))
            == "backbone.0.body.layer1.0.conv1.weight"
        )
