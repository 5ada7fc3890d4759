"""What Hugging Face's transformers calls the entries of a model, and what official files call them. Names only.

Every row is the beginning of a name there and the official one; # stands for a number. Tables are read in both
directions, and the first row that fits a name is taken.
"""

import re
from collections.abc import Iterable

STAGES, CONVOLUTIONS = range(4), range(3)
BODY, THEIR_BODY = "backbone.0.body.", "model.backbone.conv_encoder.model."
RESNET = (
    (f"{THEIR_BODY}embedder.embedder.convolution.", f"{BODY}conv1."),
    (f"{THEIR_BODY}embedder.embedder.normalization.", f"{BODY}bn1."),
    *(
        (f"{THEIR_BODY}encoder.stages.{stage}.layers.#.{theirs}.", f"{BODY}layer{stage + 1}.#.{official}.")
        for stage in STAGES
        for theirs, official in (
            *((f"layer.{i}.convolution", f"conv{i + 1}") for i in CONVOLUTIONS),
            *((f"layer.{i}.normalization", f"bn{i + 1}") for i in CONVOLUTIONS),
            ("shortcut.convolution", "downsample.0"),
            ("shortcut.normalization", "downsample.1"),
        )
    ),
)
TIMM = ((THEIR_BODY, BODY),)  # whose names are torchvision's
LAYERS = (
    *(
        (f"model.{part}.layers.#.{theirs}.", f"transformer.{part}.layers.#.{official}.")
        for part in ("encoder", "decoder")
        for theirs, official in (("fc1", "linear1"), ("fc2", "linear2"))
    ),
    ("model.encoder.layers.#.self_attn_layer_norm.", "transformer.encoder.layers.#.norm1."),
    ("model.encoder.layers.#.final_layer_norm.", "transformer.encoder.layers.#.norm2."),
    ("model.decoder.layers.#.final_layer_norm.", "transformer.decoder.layers.#.norm3."),
    ("model.query_position_embeddings.", "query_embed."),
    ("model.position_embedding.row_embeddings.", "backbone.1.row_embed."),
    ("model.position_embedding.column_embeddings.", "backbone.1.col_embed."),
)
OF_FAMILY = {
    "detr": (
        ("model.decoder.layers.#.self_attn_layer_norm.", "transformer.decoder.layers.#.norm1."),
        ("model.decoder.layers.#.encoder_attn.", "transformer.decoder.layers.#.multihead_attn."),
        ("model.decoder.layers.#.encoder_attn_layer_norm.", "transformer.decoder.layers.#.norm2."),
        ("model.decoder.layernorm.", "transformer.decoder.norm."),
        ("model.input_projection.", "input_proj."),
        ("class_labels_classifier.", "class_embed."),
        ("bbox_predictor.", "bbox_embed."),
    ),
    "deformable": (
        ("model.decoder.layers.#.self_attn_layer_norm.", "transformer.decoder.layers.#.norm2."),
        ("model.decoder.layers.#.encoder_attn.", "transformer.decoder.layers.#.cross_attn."),
        ("model.decoder.layers.#.encoder_attn_layer_norm.", "transformer.decoder.layers.#.norm1."),
        ("model.input_proj.", "input_proj."),
    ),
}
OF_FAMILY["conditional"] = (
    ("model.decoder.layers.#.encoder_attn.", "transformer.decoder.layers.#.cross_attn."),
    *OF_FAMILY["detr"],
)
ALL_ELSE = (("model.", "transformer."),)  # heads, without either, have the same names on both sides
# Names as they were before transformers 5, and what newer ones put before timm's.
OLDER = (
    ("model.backbone.position_embedding.", "model.position_embedding."),
    (f"{THEIR_BODY}_backbone.", THEIR_BODY),
)


def pairs_of(family: str, resnet: bool = True) -> tuple[tuple[str, str], ...]:
    """The rows for a family; `resnet`: of transformers' own ResNets, not of timm's."""
    return (*(RESNET if resnet else TIMM), *LAYERS, *OF_FAMILY[family], *ALL_ELSE)


def translated(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """`name` with its beginning replaced according to the first pair that fits; # in a pair stands for a number."""
    for before, after in pairs:
        fits = re.match(re.escape(before).replace(r"\#", r"(\d+)"), name)
        if fits:
            for number in fits.groups():
                after = after.replace("#", number, 1)
            return after + name[fits.end() :]
    return name
