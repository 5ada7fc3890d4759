"""DETR is the official one: number of parameters, names of entries, and the same outputs as other implementations.

Legend: B images, H heads, Q queries, K = h x w cells of the feature map, C classes.
"""

import pytest
import torch
from torch import nn

from detrlib.attention import build_transform
from detrlib.models import build_model
from detrlib.models.transformer import DecoderLayer, Encoder, EncoderLayer, LayerSettings, Memory

R50 = {"name": "resnet50", "weights": "none", "freeze_stem": True}


@pytest.fixture(scope="session")
def detr(model_settings):
    def detr(**settings) -> nn.Module:
        """DETR at full size, with the 91 classes of COCO, without memory behind its parameters."""
        with torch.device("meta"):
            return build_model(model_settings(**{"num_classes": 91, "backbone": R50} | settings))

    return detr


# Parameters


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 41_302_368),
        ({"norm": "pre"}, 41_302_880),
        ({"backbone": R50 | {"dilation": True}}, 41_302_368),
        ({"backbone": R50 | {"name": "resnet101"}}, 60_242_272),
        ({"position": "learned"}, 41_315_168),
        ({"backbone": R50 | {"name": "resnet18"}}, 28_686_688),
        ({"num_classes": 250}, 41_343_231),
        ({"attention": {"decoder_cross": "entmax15"}, "norm": "pre"}, 41_302_880),
        ({"attention": {"decoder_cross": "alpha_entmax", "alpha_init": "normal"}, "norm": "pre"}, 41_302_928),
    ],
)
def test_number_of_trainable_parameters(settings, expected, detr, trainable):
    assert trainable(detr(**settings)) == expected


def test_parts_of_detr(detr, frozen, trainable):
    model = detr()
    parts = {
        "transformer": 17_363_456,
        "class_embed": 23_644,
        "bbox_embed": 132_612,
        "query_embed": 25_600,
        "input_proj": 524_544,
        "backbone": 23_232_512,
    }
    assert {name: trainable(getattr(model, name)) for name in parts} == parts
    assert frozen(model) == frozen(model.backbone) == 222_400
    assert sum(buffer.numel() for buffer in model.buffers()) == 106_240
    assert trainable(detr(norm="pre").transformer) == 17_363_968
    assert frozen(detr(backbone=R50 | {"name": "resnet18"})) == 156_864


# Names


@pytest.mark.parametrize(
    ("pre_norm", "position", "entries"),
    [(False, "sine", 458), (True, "sine", 460), (False, "learned", 460)],
)
def test_entries_have_the_number_and_shapes_of_official_checkpoints(pre_norm, position, entries, detr):
    state = detr(norm="pre" if pre_norm else "post", position=position).state_dict()
    assert len(state) == entries
    assert state["class_embed.weight"].shape == (92, 256)
    assert state["query_embed.weight"].shape == (100, 256)
    assert state["input_proj.weight"].shape == (256, 2048, 1, 1)
    if position == "learned":
        assert state["position.row_embed.weight"].shape == (50, 128)


# Other implementations


@pytest.fixture(scope="session")
def transformers_name(transformers_backbone_name):
    def transformers_name(name: str) -> str:
        """Our name of a parameter -> the name in `transformers`, attention projections aside."""
        name = name.replace("class_embed", "class_labels_classifier").replace("bbox_embed", "bbox_predictor")
        for ours, theirs in [
            ("linear1", "mlp.fc1"),
            ("linear2", "mlp.fc2"),
            ("norm1", "self_attn_layer_norm"),
            ("multihead_attn", "encoder_attn"),
            ("out_proj", "o_proj"),
            ("input_proj", "input_projection"),
            ("query_embed", "query_position_embeddings"),
            ("decoder.norm", "decoder.layernorm"),
            ("position.row_embed", "position_embedding.row_embeddings"),
            ("position.col_embed", "position_embedding.column_embeddings"),
        ]:
            name = name.replace(ours, theirs)
        second = "encoder_attn_layer_norm" if "decoder" in name else "final_layer_norm"
        name = name.replace("norm2", second).replace("norm3", "final_layer_norm")
        if name.startswith("backbone.body"):
            name = transformers_backbone_name(name.removeprefix("backbone.body."))
        return name if name.startswith(("class_labels", "bbox")) else f"model.{name.removeprefix('transformer.')}"

    return transformers_name


@pytest.fixture(scope="session")
def transformers_state(transformers_name):
    def transformers_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for name, value in state.items():
            name = transformers_name(name)
            if "in_proj_" in name:
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    renamed[name.replace("in_proj_", f"{letter}_proj.")] = part
            else:
                renamed[name] = value
        return renamed

    return transformers_state


@pytest.fixture(scope="session")
def pair(small, transformers_state):
    def pair(backbone: str, position: str = "sine", **chosen) -> tuple[nn.Module, nn.Module]:
        """A model that treats padding as official code, and that of `transformers` with the same weights."""
        transformers = pytest.importorskip("transformers")
        choice = {"backbone": {"name": backbone, "weights": "none"} | chosen, "position": position}
        model = small(compatibility={"padding": "official"}, **choice)
        reference = transformers.DetrForObjectDetection(transformers_config(backbone == "resnet18", position)).eval()
        reference.load_state_dict(transformers_state(model.state_dict()))  # strict: nothing may be left over
        return model, reference

    return pair


def transformers_config(basic: bool, position: str):
    transformers = pytest.importorskip("transformers")
    widths = [64, 128, 256, 512]
    return transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=transformers.ResNetConfig(
            layer_type="basic" if basic else "bottleneck",
            hidden_sizes=widths if basic else [4 * width for width in widths],
            depths=[2, 2, 2, 2] if basic else [3, 4, 6, 3],
            out_features=["stage4"],
        ),
        position_embedding_type=position,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=7,
        num_labels=5,
        attn_implementation="eager",
    )


@pytest.mark.parametrize(
    ("backbone", "position"), [("resnet18", "sine"), ("resnet18", "learned"), ("resnet50", "sine")]
)
def test_agreement_with_transformers(backbone, position, pair, padded_batch):
    """The same weights give the same logits, boxes and attention maps on a padded batch."""
    model, reference = pair(backbone, position)
    images, padding = padded_batch((93, 128), (127, 60), canvas=(127, 163))
    images = images.double()  # features of random weights are so large that float32 would round maps by 1e-3
    with torch.no_grad():
        ours = model.double()(images, padding, need_attention=True)
        theirs = reference.double()(pixel_values=images, pixel_mask=(~padding).long(), output_attentions=True)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.boxes, theirs.pred_boxes, rtol=0, atol=2e-5, check_dtype=False)
    maps = {"encoder_self": "encoder_attentions", "decoder_self": "decoder_attentions"}
    for site, name in (maps | {"decoder_cross": "cross_attentions"}).items():
        for mine, other in zip(getattr(ours.attention, site), getattr(theirs, name), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    assert ours.logits.std(1).min() > 0.002  # queries differ, so that agreement means something


@pytest.mark.parametrize(("backbone", "dilation"), [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_batches_of_images_are_those_of_transformers(backbone, dilation, assert_as_transformers, pair, small):
    official, reference = pair(backbone, dilation=dilation)
    if dilation:  # `transformers` has DC5 in models of timm alone
        for number, block in enumerate(reference.model.backbone.model.encoder.stages[3].layers):
            middle = block.layer[1].convolution
            middle.stride, middle.dilation, middle.padding = (1, 1), (1 + (number > 0),) * 2, (1 + (number > 0),) * 2
            if number == 0:
                block.shortcut.convolution.stride = (1, 1)
    exact = small(backbone={"name": backbone, "weights": "none", "dilation": dilation})
    assert_as_transformers(official, reference, exact, (63, 107), (101, 59))


def layer_settings(pre_norm: bool) -> LayerSettings:
    return LayerSettings(24, 3, 40, 0.1, pre_norm, lambda site: build_transform("softmax", 3))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_layers_without_positions_are_those_of_torch(pre_norm, randomise):
    torch.manual_seed(0)
    options = {"d_model": 24, "nhead": 3, "dim_feedforward": 40, "batch_first": True, "norm_first": pre_norm}
    tokens, queries = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    memory = Memory(tokens, torch.zeros_like(tokens), padding, (1, 7))
    encoder, decoder = EncoderLayer(layer_settings(pre_norm)).eval(), DecoderLayer(layer_settings(pre_norm)).eval()
    randomise(encoder), randomise(decoder)
    reference = nn.TransformerEncoderLayer(**options).eval()
    reference.load_state_dict(encoder.state_dict())
    expected = reference(tokens, src_key_padding_mask=padding)
    valid = ~padding
    torch.testing.assert_close(encoder(memory)[0][valid], expected[valid])
    reference = nn.TransformerDecoderLayer(**options).eval()
    reference.load_state_dict(decoder.state_dict())
    found = decoder(queries, torch.zeros_like(queries), memory)[0]
    torch.testing.assert_close(found, reference(queries, tokens, memory_key_padding_mask=padding))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_registers_are_tokens_more_that_go_no_further(pre_norm, randomise):
    """As a sequence with so many tokens more, that stand nowhere and are no padding, through an encoder without any."""
    torch.manual_seed(0)
    encoder = Encoder(2, layer_settings(pre_norm), registers=3).eval()
    plain = Encoder(2, layer_settings(pre_norm)).eval()
    assert encoder.registers.abs().max() <= (6 / 27) ** 0.5
    randomise(encoder)
    plain.load_state_dict({name: value for name, value in encoder.state_dict().items() if name != "registers"})
    tokens, position = torch.randn(2, 7, 24), torch.randn(1, 7, 24)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    longer = Memory(
        torch.cat([tokens, encoder.registers.expand(2, 3, 24)], 1),
        torch.cat([position, torch.zeros(1, 3, 24)], 1),
        torch.cat([padding, torch.zeros(2, 3, dtype=torch.bool)], 1),
        None,
    )
    memory = Memory(tokens, position, padding, (1, 7))
    (found, maps), (expected, wanted) = encoder(memory, True), plain(longer, True)
    torch.testing.assert_close(found.tokens, expected.tokens[:, :7])
    for one, other in zip(maps, wanted, strict=True):
        torch.testing.assert_close(tuple(one), tuple(other))
    assert found._replace(tokens=tokens) == memory  # position, padding and grid as they were
