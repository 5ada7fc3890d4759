"""Settings of the models of this library, of two families: `Detr` and `Deformable`, told apart by `model.architecture`.

Each has the settings that mean something to it and no others. What cannot be said by a type is checked, with the reason
and the remedy. The third family, detectors of transformers, stands in `config.huggingface`.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from detrlib.config.attention import Anneal, NullKey, OwnAttention, OwnQueryAttention, SiteName
from detrlib.config.section import Section

Ratio = Annotated[float, Field(gt=0.0, le=1.0)]


class Backbone(Section):
    name: Literal["tiny", "resnet18", "resnet34", "resnet50", "resnet101", "swin_t"] = "resnet50"
    weights: str = "imagenet"  # "imagenet", "none", "crops" (see engine.pretrain), or a path to a state dict
    dilation: bool = False  # DC5: the last stage keeps its resolution
    freeze_stem: bool | None = None  # stem and first stage, as DETR does; None: if there are weights to keep

    @model_validator(mode="after")
    def _dilation_needs_bottlenecks(self):
        if self.dilation and self.name not in ("resnet50", "resnet101"):
            raise ValueError(
                f"model.backbone.dilation needs bottleneck blocks, which {self.name} has not; use resnet50"
            )
        return self

    @model_validator(mode="after")
    def _crops_are_for_convolutions(self):
        if self.weights == "crops" and self.name == "swin_t":
            raise ValueError(
                "model.backbone.weights: crops of the data pretrain convolutional backbones, and swin_t is none; "
                "use imagenet or a path"
            )
        return self


class Polling(Section):
    """PnP-DETR: encoder and decoder see the best cells, and a few tokens pooled from all others."""

    ratio: Ratio | None = None  # share of an image's cells that are kept; None: no polling
    pooled: int = Field(30, ge=0)  # tokens; published: 30, and 100 for DC5
    # Every training step draws a ratio between these, so that one model serves them all; published: 1/3 and 0.8
    train_ratios: tuple[Ratio, Ratio] | None = None


class DeformableOptions(Section):
    """Deformable DETR, and on top of it the options of Efficient DETR and of Sparse DETR."""

    levels: int = Field(4, ge=1)  # of the pyramid; those beyond the stages are made by convolutions of stride 2
    stages: tuple[int, ...] | None = None  # of the backbone, 1 to 4; None: the last three, or for one level the last
    encoder_points: int = Field(4, ge=1)  # per head and level
    decoder_points: int = Field(4, ge=1)
    refine: bool = False  # every decoder layer corrects the boxes of the one before
    two_stage: bool = False  # queries are the encoder's best proposals
    query_init: Literal["position", "memory"] = "position"  # content of queries: from the proposal's box, or its token
    class_specific_proposals: bool = False  # proposals predict classes; otherwise only that there is an object
    rho: float = Field(1.0, gt=0.0, le=1.0)  # share of the tokens that the encoder updates; 1: dense encoder
    encoder_auxiliary: bool = False  # a loss after every encoder layer

    def backbone_stages(self) -> tuple[int, ...]:
        """The stages whose feature maps are used."""
        return self.stages or ((4,) if self.levels == 1 else (2, 3, 4)[-self.levels :])

    @model_validator(mode="after")
    def _stages_end_with_the_last(self):
        stages = self.backbone_stages()
        if list(stages) != sorted(set(stages)) or not {4} <= set(stages) <= {1, 2, 3, 4}:
            raise ValueError(
                f"model.deformable.stages {list(stages)} must ascend within 1 to 4 and end with 4: no stage of the "
                "backbone may be computed for nothing"
            )
        if len(stages) > self.levels:
            raise ValueError(
                f"model.deformable.stages {list(stages)} are more than the {self.levels} levels; "
                f"set model.deformable.levels to {len(stages)} or name fewer"
            )
        return self

    @model_validator(mode="after")
    def _proposals_need_two_stages(self):
        if self.two_stage and not self.refine:
            raise ValueError(
                "model.deformable.two_stage needs a box head for every layer, which only model.deformable.refine has; "
                "set it to true"
            )
        needs = {
            "query_init: memory": self.query_init == "memory",
            "class_specific_proposals": self.class_specific_proposals,
            "encoder_auxiliary": self.encoder_auxiliary,
            "rho below 1": self.rho < 1,
        }
        chosen = [name for name, wanted in needs.items() if wanted]
        if chosen and not self.two_stage:
            raise ValueError(
                f"model.deformable, {chosen[0]}: works on proposals, which a one-stage model has not; "
                "set model.deformable.two_stage (and refine) to true"
            )
        return self


class Compatibility(Section):
    """What published weights depend on, faults included. The defaults are the correct behaviour."""

    # How a batch is padded. exact: an image alone and in any batch is predicted as the official code predicts it alone.
    # official: in batches, too, as the official code does, where predictions depend on the other images. That code
    # does not mask features, shrinks masks by nearest neighbour, and counts padding among tokens that are scored.
    padding: Literal["exact", "official"] = "exact"
    alpha_clamped: bool = False  # alpha by clamping, which has no gradient outside: the thesis's alpha_entmax


class DetrCompatibility(Compatibility):
    """Of DETR and the thesis's models with sparse cross-attention."""

    padding: Literal["exact", "official", "thesis"] = "exact"  # thesis: official, and decoder_cross favours padded keys


class DeformableCompatibility(Compatibility):
    """Of Deformable DETR and Sparse DETR."""

    dam: Literal["exact", "official"] = "exact"  # decoder attention maps half a cell off: Sparse DETR


class Attending(Section):
    """What all families have in common: sites with transforms, and classes."""

    num_classes: int | None = Field(None, ge=1)  # None: taken from the data

    @model_validator(mode="after")
    def _annealed_sites_have_an_alpha(self):
        anneal = self.attention.anneal
        if not anneal.epochs:
            if anneal != Anneal():
                raise ValueError(
                    "model.attention.anneal is of no use without model.attention.anneal.epochs; set it, to 0.8"
                )
            return self
        sites = get_args(SiteName) if anneal.sites is None else anneal.sites
        fixed = [site for site in sites if (self.alpha_at(site) or 1.0) > 1.0]
        if not fixed or (anneal.sites and fixed != list(sites)):
            found = ", ".join(f"{site} {self.transform_at(site)}" for site in sites if site not in fixed) or "no site"
            raise ValueError(
                f"model.attention.anneal moves alphas of sparsemax, entmax15 and entmax, not those of {found}; choose "
                "one of them there, or name other sites in model.attention.anneal.sites"
            )
        if passed := [site for site in fixed if self.alpha_at(site) <= anneal.start]:
            raise ValueError(
                f"model.attention.anneal.start {anneal.start} is not below the alpha {self.alpha_at(passed[0])} of "
                f"{passed[0]}, to which it moves; lower it, or leave that site out of model.attention.anneal.sites"
            )
        return self

    @model_validator(mode="after")
    def _options_have_their_sites(self):
        for option in ("null_key", "gate", "differential"):
            sites, name = getattr(self.attention, f"{option}_sites", None), f"model.attention.{option}"
            if sites is not None and getattr(self.attention, option) in ("none", False):
                raise ValueError(f"{name}_sites is of no use without {name}; set it, or leave the sites out")
            if sites == ():
                raise ValueError(f"{name}_sites names no site, and {name} would do nothing; name one, or leave it out")
            for site in sites or ():
                if not self.scores_keys(site):
                    fault = "there points are sampled and no keys scored"
                elif site == "encoder_self" and not self.encoder_layers:
                    fault = "model.encoder_layers is 0"
                else:
                    continue
                raise ValueError(f"{name}_sites {site}: {fault}; leave it out")
        return self

    @property
    def padding_matters(self) -> bool:
        """Whether predictions for an image depend on how it is padded in a batch."""
        return self.compatibility.padding != "exact"

    def transform_at(self, site: SiteName) -> str:
        """The transform of a site's scores, or "deformable" where points are sampled instead of keys scored."""
        return getattr(self.attention, site, "deformable")

    def null_key_at(self, site: SiteName) -> NullKey:
        """The null key beside the keys of a site."""
        return self.option_at("null_key", site, "none")

    def option_at(self, option: str, site: SiteName, off: Any) -> Any:
        """What `attention` says of an option that has sites of its own, such as gate; `off` where it does not apply."""
        sites = getattr(self.attention, f"{option}_sites")
        there = self.scores_keys(site) if sites is None else site in sites
        return getattr(self.attention, option) if there else off

    def alpha_at(self, site: SiteName) -> float | None:
        """The alpha of a site's transform, or None where it is learned or there is none."""
        fixed = {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0, "entmax": self.attention.alpha}
        return fixed.get(self.transform_at(site))

    def annealed_alphas(self, epochs: float) -> dict[SiteName, float]:
        """The alphas of `attention.anneal` by site after `epochs` of training; none where nothing is annealed.

        A straight line from the start to the alpha of the transform, which is met exactly.
        """
        anneal = self.attention.anneal
        if not anneal.epochs:
            return {}
        aims = {site: self.alpha_at(site) for site in anneal.sites or get_args(SiteName)}
        left = max(0.0, 1 - epochs / anneal.epochs)
        return {site: left * anneal.start + (1 - left) * aim for site, aim in aims.items() if aim not in (None, 1.0)}

    def scores_keys(self, site: SiteName) -> bool:
        """Whether keys are scored at a site; otherwise points are sampled."""
        return hasattr(self.attention, site)

    @property
    def cells_ask(self) -> bool:
        """Whether the queries of encoder_self are the cells of the map that it attends to."""
        return self.scores_keys("encoder_self")

    @property
    def proposal_head(self) -> int | None:
        """The number of the class head that says only that there is an object, where there is one."""
        return None


class Architecture(Attending):
    """What the two families of this library have in common."""

    backbone: Backbone = Backbone()
    hidden_dim: int = Field(256, ge=8, multiple_of=4)  # sines and cosines of x and y: a multiple of 4
    num_heads: int = Field(8, ge=1)
    encoder_layers: int = Field(6, ge=0)
    decoder_layers: int = Field(6, ge=1)
    feedforward_dim: int = Field(2048, ge=1)
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    position: Literal["sine", "learned"] = "sine"
    position_temperature: float = Field(10000.0, gt=0.0)
    num_queries: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _heads_share_the_channels(self):
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"model.hidden_dim {self.hidden_dim} is not a multiple of model.num_heads {self.num_heads}"
            )
        if self.attention.differential and self.hidden_dim // self.num_heads % 2:
            raise ValueError(
                f"model.attention.differential needs an even number of channels in each head; model.hidden_dim "
                f"{self.hidden_dim} by model.num_heads {self.num_heads} is odd"
            )
        return self


class Detr(Architecture):
    """DETR with any transform at any site, learned or anchor queries, and PnP-DETR's polling."""

    architecture: Literal["detr"] = "detr"
    attention: OwnAttention = OwnAttention()
    polling: Polling = Polling()
    registers: int = Field(0, ge=0)  # learned tokens beside those of the image in the encoder
    norm: Literal["post", "pre"] = "post"
    # learned: positions; conditional: positions that stand for points, as in Conditional DETR; anchor: reference boxes,
    # as in DAB-DETR. The last two have conditional cross-attention.
    queries: Literal["learned", "conditional", "anchor"] = "learned"
    classification: Literal["softmax", "sigmoid"] = "softmax"  # softmax adds a no-object class
    compatibility: DetrCompatibility = DetrCompatibility()

    @property
    def cells_ask(self) -> bool:
        """As of `Attending`: of a model that polls, kept cells and pooled tokens ask."""
        return self.polling.ratio is None

    @model_validator(mode="after")
    def _encoder_exists(self):
        if not self.encoder_layers and self.attention.encoder_self != "softmax":
            raise ValueError(
                f"model.attention.encoder_self {self.attention.encoder_self}: model.encoder_layers is 0, there is no "
                "encoder to use it; set model.encoder_layers to 1 or more"
            )
        if not self.encoder_layers and self.registers:
            raise ValueError("model.registers stand in the encoder, and model.encoder_layers is 0; set it to 1 or more")
        return self

    @model_validator(mode="after")
    def _polled_tokens_are_no_grid(self):
        if self.polling == Polling():
            return self
        if self.polling.ratio is None:
            raise ValueError("model.polling is of no use without model.polling.ratio; set it, to 0.333 for example")
        if "tvmax" in (self.attention.encoder_self, self.attention.decoder_cross):
            raise ValueError(
                "model.polling keeps cells that form no grid, which tvmax needs; choose another transform at "
                "model.attention.encoder_self and model.attention.decoder_cross"
            )
        if self.compatibility.padding == "thesis":
            raise ValueError("model.polling hides padding always; set model.compatibility.padding to exact or official")
        return self


class Deformable(Architecture):
    """Post-norm, with learned queries that have references of their own, and focal losses without a no-object class."""

    architecture: Literal["deformable"] = "deformable"
    attention: OwnQueryAttention = OwnQueryAttention()
    deformable: DeformableOptions = DeformableOptions()
    compatibility: DeformableCompatibility = DeformableCompatibility()

    @property
    def proposal_head(self) -> int | None:
        """As of `Attending`."""
        chosen = self.deformable
        return self.decoder_layers if chosen.two_stage and not chosen.class_specific_proposals else None

    @model_validator(mode="after")
    def _encoder_exists(self):
        if self.encoder_layers < 1 and (self.deformable.rho < 1 or self.deformable.encoder_auxiliary):
            raise ValueError(
                "model.deformable: rho below 1 and encoder_auxiliary need model.encoder_layers of 1 or more"
            )
        return self
