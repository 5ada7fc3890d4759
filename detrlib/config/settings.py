"""Every setting there is, with its default; which combinations make no sense, with the reason and the remedy."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TransformName = Literal["softmax", "sparsemax", "entmax15", "entmax", "alpha_entmax", "tvmax"]
Ratio = Annotated[float, Field(gt=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Backbone(Section):
    name: Literal["tiny", "resnet18", "resnet34", "resnet50", "resnet101", "swin_t"] = "resnet50"
    weights: str = "imagenet"  # "imagenet", "none", "crops" (see pretrain.py), or a path to a state dict
    dilation: bool = False  # DC5: the last stage keeps its resolution
    freeze_stem: bool | None = None  # stem and first stage, as DETR does; None: if there are weights to keep
    mask_padding: bool = True  # False: features near padding depend on the batch, as in the official code

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


class Attention(Section):
    encoder_self: TransformName = "softmax"
    decoder_self: TransformName = "softmax"
    decoder_cross: TransformName = "softmax"
    alpha: float = Field(1.5, ge=1.000001, le=2.0)  # of "entmax", fixed
    # of "alpha_entmax"; "normal": pre_alpha from N(0, 1); "cloned": so too, but one draw for all layers of a site
    alpha_init: float | Literal["normal", "cloned"] = 1.5
    tv_lambda: float = Field(0.1, ge=0.0)  # of "tvmax": price of a step between neighbouring cells
    # For weights of the first published models with sparse cross-attention: alpha by clamping, padded keys of
    # decoder_cross favoured instead of hidden. Their backbones did not mask padding either: backbone.mask_padding.
    alpha_clamped: bool = False
    padding: Literal["hidden", "add_one"] = "hidden"

    @model_validator(mode="after")
    def _alpha_starts_inside_its_range(self):
        if not isinstance(self.alpha_init, str) and not 1.01 < self.alpha_init < 2.0:
            raise ValueError(
                f"model.attention.alpha_init {self.alpha_init} must lie between 1.01 and 2, or be 'normal' or 'cloned'"
            )
        return self

    @model_validator(mode="after")
    def _tvmax_has_a_grid(self):
        if self.decoder_self == "tvmax":
            raise ValueError(
                "model.attention.decoder_self: tvmax needs keys that form a grid, and these are queries; "
                "use it at encoder_self or decoder_cross"
            )
        return self


class Deformable(Section):
    """Deformable DETR, and on top of it the options of Efficient DETR and of Sparse DETR."""

    levels: int = Field(4, ge=1)  # of the pyramid; those beyond the stages are made by convolutions of stride 2
    stages: tuple[int, ...] | None = None  # of the backbone, 1 to 4; None: the last three, or for one level the last
    encoder_points: int = Field(4, ge=1)  # per head and level
    decoder_points: int = Field(4, ge=1)
    refine: bool = False  # every decoder layer corrects the boxes of the one before
    two_stage: bool = False  # queries are the encoder's best proposals
    query_init: Literal["position", "memory"] = "position"  # content of queries: of the proposal's place, or its token
    class_specific_proposals: bool = False  # proposals predict classes; otherwise only that there is an object
    rho: float = Field(1.0, gt=0.0, le=1.0)  # share of the tokens that the encoder updates; 1: dense encoder
    encoder_auxiliary: bool = False  # a loss after every encoder layer
    # For published weights of Sparse DETR: scores that depend on padding, attention maps half a cell off.
    token_scores: Literal["masked", "official"] = "masked"
    dam: Literal["exact", "official"] = "exact"

    def backbone_stages(self) -> tuple[int, ...]:
        """The stages whose feature maps are used."""
        return self.stages or ((4,) if self.levels == 1 else (2, 3, 4)[-self.levels :])

    @model_validator(mode="after")
    def _consistent(self):
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
        for name, chosen in needs.items():
            if chosen and not self.two_stage:
                raise ValueError(
                    f"model.deformable, {name}: works on proposals, which a one-stage model has not; "
                    "set model.deformable.two_stage (and refine) to true"
                )
        return self


class Polling(Section):
    """PnP-DETR: encoder and decoder see the best cells, and a few tokens pooled from all others."""

    ratio: Ratio | None = None  # share of an image's cells that are kept; None: no polling
    pooled: int = Field(30, ge=0)  # tokens; published: 30, and 100 for DC5
    # Every training step draws a ratio between these, so that one model serves them all; published: 1/3 and 0.8
    train_ratios: tuple[Ratio, Ratio] | None = None


class Model(Section):
    # The last two are torchvision's, to be compared with; they take none of the settings below but numbers.
    architecture: Literal["detr", "deformable", "faster_rcnn", "faster_rcnn_v2"] = "detr"
    backbone: Backbone = Backbone()
    attention: Attention = Attention()
    deformable: Deformable = Deformable()  # of architecture "deformable"
    polling: Polling = Polling()  # of architecture "detr"
    hidden_dim: int = Field(256, ge=8)
    num_heads: int = Field(8, ge=1)
    encoder_layers: int = Field(6, ge=0)
    decoder_layers: int = Field(6, ge=1)
    feedforward_dim: int = Field(2048, ge=1)
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    norm: Literal["post", "pre"] = "post"
    position: Literal["sine", "learned"] = "sine"
    position_temperature: float = Field(10000.0, gt=0.0)
    queries: Literal["learned", "anchor"] = "learned"  # "anchor": 4-d reference boxes, conditional cross-attention
    num_queries: int = Field(100, ge=1)  # of Faster R-CNN: detections of an image at most
    classification: Literal["softmax", "sigmoid"] = "softmax"  # softmax adds a no-object class
    num_classes: int | None = Field(None, ge=1)  # None: taken from the data

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"model.hidden_dim {self.hidden_dim} is not a multiple of model.num_heads {self.num_heads}"
            )
        if self.hidden_dim % 4:
            raise ValueError(f"model.hidden_dim {self.hidden_dim} must be a multiple of 4 (sine of x and y)")
        if not self.encoder_layers and self.attention.encoder_self != "softmax":
            raise ValueError(
                f"model.attention.encoder_self {self.attention.encoder_self}: model.encoder_layers is 0, there is no "
                "encoder to use it; set model.encoder_layers to 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _polled_tokens_are_no_grid(self):
        chosen = self.attention
        refused = (
            (self.polling.ratio is None, "is of no use without model.polling.ratio; set it, to 0.333 for example"),
            (
                self.architecture != "detr",
                "needs model.architecture detr; deformable keeps fewer by model.deformable.rho",
            ),
            (
                "tvmax" in (chosen.encoder_self, chosen.decoder_cross),
                "keeps cells that form no grid, which tvmax needs; choose another transform at "
                "model.attention.encoder_self and model.attention.decoder_cross",
            ),
            (chosen.padding != "hidden", "hides padding always; leave model.attention.padding at hidden"),
        )
        for wrong, reason in refused:
            if wrong and self.polling != Polling():
                raise ValueError(f"model.polling {reason}")
        return self

    @model_validator(mode="after")
    def _deformable_is_a_family_of_its_own(self):
        if self.architecture != "deformable":
            if self.deformable != Deformable():
                raise ValueError(
                    f"model.deformable is of no use to model.architecture {self.architecture}; set it to deformable"
                )
            return self
        for name, needed, reason in (
            ("classification", "sigmoid", "it is trained by focal losses, without a no-object class"),
            ("queries", "learned", "its queries have references of their own"),
            ("norm", "post", "its layers are those of the published weights"),
        ):
            if getattr(self, name) != needed:
                raise ValueError(f"model.architecture deformable needs model.{name}: {needed}; {reason}")
        for site in ("encoder_self", "decoder_cross"):
            if getattr(self.attention, site) != "softmax":
                raise ValueError(
                    f"model.attention.{site}: deformable attention compares no query with a key and has weights of its "
                    "own; leave it at softmax, or choose transforms at decoder_self"
                )
        if self.attention.padding != "hidden":
            raise ValueError("model.attention.padding: deformable attention hides padding always; leave it at hidden")
        if self.encoder_layers < 1 and (self.deformable.rho < 1 or self.deformable.encoder_auxiliary):
            raise ValueError(
                "model.deformable: rho below 1 and encoder_auxiliary need model.encoder_layers of 1 or more"
            )
        return self

    @property
    def attends(self) -> bool:
        """Whether there is attention to look at: Faster R-CNN has none."""
        return not self.architecture.startswith("faster_rcnn")

    @model_validator(mode="after")
    def _faster_rcnn_is_what_torchvision_made_it(self):
        if self.attends:
            return self
        if self.backbone != Backbone(weights="none"):
            raise ValueError(
                f"model.backbone: that of model.architecture {self.architecture} is torchvision's resnet50, whose "
                "weights are in the file of the whole model; set model.backbone.weights to none and nothing else"
            )
        free = ("architecture", "backbone", "num_queries", "num_classes")
        for name, field in type(self).model_fields.items():
            if name not in free and getattr(self, name) != field.default:
                raise ValueError(
                    f"model.{name} is of no use to model.architecture {self.architecture}, which is no transformer; "
                    "leave it at its default"
                )
        return self


class Shapes(Section):
    """The embedded data set, drawn once per combination of these values."""

    train: int = Field(4000, ge=0)
    val: int = Field(500, ge=0)
    size: int = Field(128, ge=64)  # side of the square images, pixels
    seed: int = 0


class Data(Section):
    root: str = "shapes"  # "shapes", or a COCO-format folder; relative paths start at the project root
    train_split: str = "train2017"  # images in root/<split>, annotations/instances_<split>.json
    val_split: str = "val2017"
    train_images: str | None = None  # explicit paths win over root and split
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    train_limit: int | None = Field(None, ge=1)  # keep the first n images
    val_limit: int | None = Field(None, ge=1)
    contiguous: bool = False  # labels 0..n-1 instead of the original category ids
    strict: bool = False  # refuse degenerate boxes instead of dropping them with a count
    image_size: int = Field(800, ge=32)  # shorter side in validation; training scales are relative to it
    augment: Literal["detr", "flip", "none"] = "detr"
    cache: bool = False  # keep decoded images in memory
    workers: int = Field(2, ge=0)
    shapes: Shapes = Shapes()

    @model_validator(mode="after")
    def _cache_is_in_one_process(self):
        if self.cache and self.workers:
            raise ValueError(
                "data.cache works without workers only, which forget it every epoch: set data.workers to 0"
            )
        return self


class Loss(Section):
    cost_class: float = 1.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    weight_class: float = 1.0
    weight_bbox: float = 5.0
    weight_giou: float = 2.0
    weight_mask: float = 1.0  # of the scoring network of a sparse encoder
    weight_poll: float = 1e-4  # of the mean score of kept cells, where model.polling keeps some
    no_object: float = Field(0.1, gt=0.0)  # weight of the no-object class in the cross-entropy
    focal_alpha: float = Field(0.25, gt=0.0, lt=1.0)
    auxiliary: bool = True  # a loss after every decoder layer


class Tracking(Section):
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "sparse-attention-detr"
    group: str | None = None
    # Further services, through Accelerate; tensorboard writes to the folder tracking of the run.
    also: tuple[
        Literal["tensorboard", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"], ...
    ] = ()


class Train(Section):
    epochs: int = Field(300, ge=1)
    batch_size: int = Field(16, ge=1)  # over all processes: results do not depend on their number
    lr: float = Field(1e-4, gt=0.0)
    lr_backbone: float = Field(1e-5, ge=0.0)  # 0 freezes the backbone
    lr_alpha: float | None = Field(None, ge=0.0)  # None: 10 x lr
    lr_projections: float | None = Field(None, ge=0.0)  # sampling offsets, reference points; None: 0.1 x lr
    alpha_keeps_lr: bool = False  # the schedule leaves the alpha group alone
    weight_decay: float = Field(1e-4, ge=0.0)
    schedule: Literal["step", "cosine", "constant"] = "step"
    lr_drop: int = Field(200, ge=1)  # epochs until the step
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float = Field(0.1, ge=0.0)  # 0: no clipping
    precision: Literal["float32", "bfloat16"] = "float32"
    ema: float = Field(0.0, ge=0.0, lt=1.0)  # decay of an exponential moving average of the weights; 0: none
    seed: int = 42
    log_every: int = Field(50, ge=1)  # iterations
    eval_every: int = Field(1, ge=1)  # epochs; the last one is always evaluated
    keep_every: int = Field(0, ge=0)  # epochs between checkpoints that are kept for good; 0: only last and best
    tracking: Tracking = Tracking()


class Evaluate(Section):
    batch_size: int = Field(8, ge=1)  # per process
    examples: int = Field(8, ge=0)  # first images whose detections and attention maps are stored for figures
    store_maps: Annotated[int, Field(ge=0)] | Literal["all"] = 0  # more first images whose maps are stored, or all
    store_sites: tuple[Literal["decoder_cross", "decoder_self", "encoder_self"], ...] = ("decoder_cross",)
    zero_threshold: float = Field(1e-6, ge=0.0)  # below it a softmax weight counts as zero in zeros_thresholded
    zero_share: float = Field(1e-3, ge=0.0)  # of the mean weight 1/K: below it a weight counts in zeros_relative
    confident_score: float = Field(0.5, ge=0.0, le=1.0)  # queries above it are measured as "confident"
    count_padding: bool = False  # padded keys count in K, as in published Gini indices and zeros; false: left out
    paibb: Literal["exact", "thesis"] = "exact"  # "thesis": enlarged maps, whole pixels, as in published PAIBB

    @model_validator(mode="after")
    def _cross_attention_is_always_stored(self):
        if "decoder_cross" not in self.store_sites:
            raise ValueError("evaluate.store_sites: examples are drawn with their decoder_cross maps; name it too")
        return self


class Config(Section):
    data: Data = Data()
    model: Model = Model()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _sites_to_store_exist(self):
        if "encoder_self" in self.evaluate.store_sites and not self.model.encoder_layers:
            raise ValueError(
                "evaluate.store_sites: model.encoder_layers is 0, there is no encoder_self to store; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _every_head_has_a_loss(self):
        if self.model.architecture == "deformable" and self.model.deformable.refine and not self.loss.auxiliary:
            raise ValueError(
                "loss.auxiliary: with model.deformable.refine every layer has heads of its own, "
                "which learn from its own loss only; set it to true"
            )
        return self

    @model_validator(mode="after")
    def _faster_rcnn_takes_data_as_it_was_made_for(self):
        if not self.model.architecture.startswith("faster_rcnn"):
            return self
        if self.data.contiguous:
            raise ValueError(
                f"data.contiguous: class 0 of model.architecture {self.model.architecture} is its background, "
                "which no category can be; set it to false"
            )
        if self.train.precision != "float32":
            raise ValueError(
                f"train.precision: model.architecture {self.model.architecture} computes boxes in pixels, which "
                f"{self.train.precision} rounds; set it to float32"
            )
        return self
