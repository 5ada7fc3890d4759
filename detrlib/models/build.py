"""From settings to a model: the one place where configuration and architecture meet."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from detrlib.attention import AlphaEntmax, Transform, build_transform
from detrlib.attention.build import TransformSettings
from detrlib.attention.gates import Difference, Gate
from detrlib.attention.transforms import Entmax
from detrlib.config import Deformable, Detr, HuggingFace, Model, project_path
from detrlib.config.attention import QueryAttention, SiteName
from detrlib.config.huggingface import POINTS, SQUARE, require_transformers, their_config
from detrlib.errors import ConfigError
from detrlib.models.backbone import Backbone, CellView, build_backbone, cell_view, measured_view
from detrlib.models.deformable import DeformableDETR
from detrlib.models.deformable_layers import DeformableDecoder, DeformableEncoder, DeformableTransformer
from detrlib.models.detr import DETR, Transformer
from detrlib.models.outputs import site_of
from detrlib.models.pnp import PollAndPool
from detrlib.models.position import LearnedPosition, SinePosition
from detrlib.models.pyramid import LevelProjections
from detrlib.models.sparse import ScoringNetwork
from detrlib.models.transformer import AnchorDecoder, Decoder, Encoder, LayerSettings, MakeTransform, PointDecoder

STEM = re.compile(r"\.(embedder|encoder\.stages\.0)\.")  # and the first stage, of transformers' backbones


def build_model(settings: Model, backbone_weights: str | Path | None = None) -> nn.Module:
    """The model that settings describe, with weights drawn at random but for those of a pretrained backbone.

    The weights of `model.source`, of a detector of transformers, are loaded where training starts (engine/start.py).

    Args:
        settings: the section `model` of a config.
        backbone_weights: used in place of `backbone.weights` of the settings: "none", "imagenet", or a file (see
            engine/pretrain.py); None: what the settings say.

    Returns:
        A `DETR`, a `DeformableDETR` or a `HuggingFaceDetector`, by the architecture of the settings, on the CPU and in
        training mode. All are called as `model(images [B,3,H,W], padding_mask [B,H,W] or None, need_attention)` and
        return `Predictions`.

    Raises:
        ConfigError: the settings need to know the data, as in `num_classes: null` and weights of "crops".
        WeightsError: weights of the backbone cannot be downloaded or read, or are of another one.
    """
    if settings.num_classes is None:
        raise ConfigError("model.num_classes is not known without a data set; set it, or train through a config")
    if isinstance(settings, HuggingFace):
        return _huggingface(settings)
    build = _deformable if isinstance(settings, Deformable) else _detr
    return build(settings, backbone_weights)


def _detr(settings: Detr, weights: str | Path | None) -> DETR:
    layer = _layer_settings(settings, pre_norm=settings.norm == "pre")
    anchors = settings.queries == "anchor"
    if settings.queries == "learned":
        decoder = Decoder(settings.decoder_layers, layer)
    else:
        kind = AnchorDecoder if anchors else PointDecoder
        decoder = kind(settings.decoder_layers, layer, settings.position_temperature)
    poll, polling = None, settings.polling
    if polling.ratio is not None:
        poll = PollAndPool(settings.hidden_dim, polling.ratio, polling.pooled, polling.train_ratios)
    return DETR(
        _backbone(settings, weights),
        _position(settings, centred=anchors),
        Transformer(Encoder(settings.encoder_layers, layer, poll, settings.registers), decoder),
        settings.hidden_dim,
        settings.num_queries,
        settings.num_classes,
        settings.classification,
    )


def _deformable(settings: Deformable, weights: str | Path | None) -> DeformableDETR:
    chosen, published, dim = settings.deformable, settings.compatibility, settings.hidden_dim
    layer = _layer_settings(settings, pre_norm=False)
    levels, official = chosen.levels, published.padding == "official"
    backbone = _backbone(settings, weights, chosen.backbone_stages())
    scoring = ScoringNetwork(dim, official) if chosen.rho < 1 else None
    transformer = DeformableTransformer(
        DeformableEncoder(settings.encoder_layers, layer, levels, chosen.encoder_points),
        DeformableDecoder(settings.decoder_layers, layer, levels, chosen.decoder_points, chosen.refine),
        dim,
        levels,
        chosen.two_stage,
        chosen.query_init == "memory",
        scoring,
        settings.position_temperature,
    )
    return DeformableDETR(
        backbone,
        _position(settings, centred=True),
        LevelProjections(backbone.num_channels, levels, dim, official),
        transformer,
        dim,
        settings.num_queries,
        settings.num_classes,
        two_stage=chosen.two_stage,
        class_specific=chosen.class_specific_proposals,
        encoder_auxiliary=chosen.encoder_auxiliary,
        keep_ratio=chosen.rho,
        official_padding=official,
        map_shift=0.5 if published.dam == "exact" else 0.0,
    )


def _huggingface(settings: HuggingFace) -> nn.Module:
    require_transformers()
    from transformers import AutoModelForObjectDetection

    from detrlib.data.augment import MEAN, STD
    from detrlib.models.huggingface import HuggingFaceDetector, blaming_options
    from detrlib.models.huggingface_attention import sites_of, use

    kind, options = settings.kind, settings.options_in_full()
    if len(options.get("encode_proj_layers", [0])) > 1:
        raise ConfigError("model.options.encode_proj_layers names several levels; maps of one grid are drawn: name one")
    # All layers learn, from our losses; denoising queries come with transformers' own.
    theirs = their_config(kind, options | {"auxiliary_loss": True} | ({"num_denoising": 0} if kind in SQUARE else {}))
    theirs.num_labels = settings.num_classes
    with blaming_options():
        model = AutoModelForObjectDetection.from_config(theirs)
    for name, parameter in model.named_parameters():
        if "backbone." in name:  # some types freeze all of it where it is transformers' own
            parameter.requires_grad_(not (settings.stem_is_frozen and STEM.search(name)))
    pixels = {"square": settings.square, "mean": MEAN, "std": STD} if kind in SQUARE else {}
    stride = 2 ** (1 + int(theirs.backbone_config.out_features[0][-1])) if kind in POINTS else None
    detector = HuggingFaceDetector(model, settings.classification, stride, **pixels)
    attention = settings.attention
    chosen = {site: getattr(attention, site) for site in get_args(SiteName)}
    plain = [site for site in chosen if not settings.scores_keys(site) or site not in sites_of(model)]
    chosen = {site: name for site, name in chosen.items() if name != "softmax" or site not in plain}
    told = transform_settings(attention) | {"alpha_init": attention.alpha_init}
    for site, name in chosen.items():
        use(name, model, site, **told, null_key=settings.null_key_at(site))
    return detector


def backbone_view(settings: Model) -> CellView:
    """What a cell of the last feature map stands for, and what it sees of the image without attention, in pixels.

    Raises ConfigError where the backbone of transformers is not known.
    """
    if not isinstance(settings, HuggingFace):
        return cell_view(settings.backbone.name, settings.backbone.dilation)
    require_transformers()
    from transformers import AutoBackbone

    theirs = their_config(settings.kind, settings.options_in_full())
    return measured_view(AutoBackbone.from_config(theirs.backbone_config))


def _position(settings: Model, centred: bool) -> nn.Module:
    if settings.position == "sine":
        return SinePosition(settings.hidden_dim, settings.position_temperature, centred)
    return LearnedPosition(settings.hidden_dim)


def _layer_settings(settings: Model, pre_norm: bool) -> LayerSettings:
    return LayerSettings(
        settings.hidden_dim,
        settings.num_heads,
        settings.feedforward_dim,
        settings.dropout,
        pre_norm,
        _transform_maker(settings),
        _heads_maker(settings),
    )


def _heads_maker(settings: Model) -> Callable[[str], dict]:
    """What layers ask for gate and difference of a site, first layer to last."""
    layers = Counter()

    def make(site: str) -> dict:
        layers[site] += 1
        dim, heads, gate = settings.hidden_dim, settings.num_heads, settings.option_at("gate", site, "none")
        differential = settings.option_at("differential", site, False)
        return {
            "gate": None if gate == "none" else Gate(dim, heads, gate),
            "difference": Difference(dim // heads, layers[site]) if differential else None,
        }

    return make


def transform_settings(attention: QueryAttention) -> dict[str, float]:
    """What a config tells transforms at any site: without where alpha starts and null keys, see `build_transform`."""
    shared = set(TransformSettings._fields) - {"alpha_init", "null_key"}
    return {name: value for name, value in dict(attention).items() if name in shared}


def _transform_maker(settings: Model) -> MakeTransform:
    """What layers ask for the transform of a site; every layer gets one of its own."""
    drawn = {}  # pre_alpha by site, where layers start as clones of one draw

    def make(site: str) -> Transform:
        name, initial = settings.transform_at(site), settings.attention.alpha_init
        if name == "alpha_entmax" and initial == "cloned":
            initial = drawn.setdefault(site, torch.randn(settings.num_heads))
        transform = build_transform(
            name,
            settings.num_heads,
            alpha_init=initial,
            alpha_clamped=settings.compatibility.alpha_clamped,
            null_key=settings.null_key_at(site),
            **transform_settings(settings.attention),
        )
        transform.padding_adds_one = settings.compatibility.padding == "thesis" and site == "decoder_cross"
        return transform

    return make


def _backbone(settings: Model, weights: str | Path | None, stages: Sequence[int] = (4,)) -> Backbone:
    choice = settings.backbone
    weights = choice.weights if weights is None else weights
    if weights == "crops":
        raise ConfigError("model.backbone.weights 'crops' needs data: call engine.pretrain.backbone_weights first")
    if str(weights) not in ("none", "imagenet"):
        weights = project_path(weights)
    # Weights of a checkpoint are still to come when a run resumes: what is trained depends on the settings alone.
    freeze_stem = choice.weights != "none" if choice.freeze_stem is None else choice.freeze_stem
    official = settings.compatibility.padding != "exact"
    return build_backbone(choice.name, weights, choice.dilation, freeze_stem, official, stages)


def transform_modules(model: nn.Module) -> dict[str, Transform]:
    """Transforms by site and layer, e.g. "decoder_cross.0" for the first decoder layer's cross-attention."""
    return _transforms(model, Transform)


def alpha_modules(model: nn.Module) -> dict[str, AlphaEntmax]:
    """Those of `transform_modules` whose alpha is learned."""
    return _transforms(model, AlphaEntmax)


def set_alphas(model: nn.Module, alphas: Mapping[str, float]) -> None:
    """Give transforms with one fixed alpha another one, by site: {"decoder_cross": 1.2}; 1 is softmax."""
    for layer, transform in _transforms(model, Entmax).items():
        transform.alpha = alphas.get(layer.split(".")[0], transform.alpha)


def _transforms(model: nn.Module, kind: type[Transform]) -> dict[str, Transform]:
    """Transforms of a kind by site and layer."""
    transforms, layers = {}, Counter()
    for path, module in model.named_modules():
        site, transform = site_of(path), getattr(module, "transform", None)
        if site is None or not isinstance(transform, Transform):
            continue
        inner = [each for each in transform.modules() if isinstance(each, kind)]
        transforms |= {f"{site}.{layers[site]}": each for each in inner}
        layers[site] += 1
    return transforms


def sampling_projections(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that decide where deformable attention looks; they learn at a rate of their own."""
    parameters = []
    for module in model.modules():
        if hasattr(module, "sampling_offsets"):
            parameters += module.sampling_offsets.parameters()
        elif isinstance(module, DeformableTransformer) and module.reference_points is not None:
            parameters += module.reference_points.parameters()
    return parameters
