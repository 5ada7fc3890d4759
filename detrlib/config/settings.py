"""Every setting there is, with its default: `Config` and its sections; those of a model stand in `model`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from detrlib.config.agreement import disagreement
from detrlib.config.attention import SiteName
from detrlib.config.huggingface import HuggingFace
from detrlib.config.model import MOST_CLASSES, Deformable, Detr
from detrlib.config.section import Section

FAMILIES = {"detr": Detr, "deformable": Deformable, "huggingface": HuggingFace}


def architecture_of(model: Any) -> str:
    """The family that a section, or the values of one, belong to."""
    name = model.get("architecture", "detr") if isinstance(model, dict) else getattr(model, "architecture", "detr")
    return name if isinstance(name, str) else repr(name)


Model = Annotated[
    Annotated[Detr, Tag("detr")]
    | Annotated[Deformable, Tag("deformable")]
    | Annotated[HuggingFace, Tag("huggingface")],
    Discriminator(architecture_of),
]


class Shapes(Section):
    """The embedded data set, drawn once per combination of these values."""

    train: int = Field(4000, ge=0, le=10**6)
    val: int = Field(500, ge=0, le=10**6)
    size: int = Field(128, ge=64, le=4096)  # side of the square images, pixels
    seed: int = Field(0, ge=0)


class Data(Section):
    # "shapes", or a folder in the layout of COCO, Roboflow, YOLO (or its data.yaml) or Pascal VOC, see
    # detrlib/data/formats.py; relative paths start at the project root.
    root: str = Field("shapes", min_length=1)
    train_split: str = "train2017"  # also what the folder calls so: train
    val_split: str = "val2017"  # val, valid, validation
    holdout: float | None = Field(None, gt=0.0, lt=1.0)  # share of the training images to validate on instead
    holdout_seed: int = 0  # which ones they are: the same for every train.seed
    train_images: str | None = None  # explicit paths win over root and split
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    train_limit: int | None = Field(None, ge=1)  # keep the first n images
    val_limit: int | None = Field(None, ge=1)
    contiguous: bool = False  # labels 0..n-1 instead of the original category ids
    # Names of the classes by label, null where a label has none; those of every split are matched with these by name.
    classes: tuple[str | None, ...] | None = None  # None: taken from the training split
    strict: bool = False  # refuse degenerate boxes instead of dropping them with a count
    # Boxes beyond their image are cut to it for training and evaluation (both), or, as official code does, for training
    # only, which judges a detector by more than it can see.
    clip: Literal["both", "training"] = "both"
    orientation: Literal["stored", "exif"] = "stored"  # of the pixels that boxes refer to: as in the file, or as shown
    truncated: Literal["refuse", "accept"] = "refuse"  # JPEG files cut short; accept: what is left of them, then grey
    # Before training: decode every picture once (all; remembered, about 5 ms each and core), read the headers, or none.
    check: Literal["all", "headers", "none"] = "all"
    image_size: int = Field(800, ge=32, le=2**14)  # shorter side in validation; training scales are relative to it
    augment: Literal["detr", "flip", "none"] = "detr"
    # Whether every image draws its size in augment: detr, as published, or a batch does for all of its images, of whose
    # pixels less is padding then (metrics: extra/padding).
    scales: Literal["image", "batch"] = "image"
    cache: bool = False  # keep decoded images in memory, at the largest scale that training draws
    # Processes that prepare images; auto: one for every core that the training processes of the machine leave, 8 at
    # most, and none with `cache`. Results do not depend on it.
    workers: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    shapes: Shapes = Shapes()

    @property
    def names(self) -> dict[int, str] | None:
        """Label -> name of its class, where `classes` are known."""
        return self.classes and {label: name for label, name in enumerate(self.classes) if name is not None}

    @model_validator(mode="after")
    def _classes_have_names(self):
        if self.classes is not None and not any(name and name.strip() for name in self.classes):
            raise ValueError("data.classes names no class; leave it out to take those of the training split")
        if len(self.classes or ()) > MOST_CLASSES:
            raise ValueError(f"data.classes: {len(self.classes)} are more than the {MOST_CLASSES} that there may be")
        return self

    @model_validator(mode="after")
    def _cache_is_in_one_process(self):
        if self.cache and self.workers not in (0, "auto"):
            raise ValueError("data.cache works without workers only, or each would fill its own: set data.workers to 0")
        return self


class Loss(Section):
    cost_class: float = Field(1.0, ge=0.0)
    cost_bbox: float = Field(5.0, ge=0.0)
    cost_giou: float = Field(2.0, ge=0.0)
    weight_class: float = Field(1.0, ge=0.0)
    weight_bbox: float = Field(5.0, ge=0.0)
    weight_giou: float = Field(2.0, ge=0.0)
    weight_mask: float = Field(1.0, ge=0.0)  # of the scoring network of a sparse encoder
    weight_poll: float = Field(1e-4, ge=0.0)  # of the mean score of kept cells, where model.polling keeps some
    no_object: float = Field(0.1, gt=0.0)  # weight of the no-object class in the cross-entropy
    focal_alpha: float = Field(0.25, gt=0.0, lt=1.0)
    auxiliary: bool = True  # a loss after every decoder layer

    @model_validator(mode="after")
    def _something_counts(self):
        for kind, what in (("weight", "nothing is learned"), ("cost", "any query is as good as another")):
            names = [f"loss.{kind}_{part}" for part in ("class", "bbox", "giou")]
            if not any(getattr(self, name.removeprefix("loss.")) for name in names):
                raise ValueError(f"{', '.join(names)} are all 0: {what}; raise one of them")
        return self


class Tracking(Section):
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "sparse-attention-detr"
    group: str | None = None
    artifacts: bool = True  # at the end examples with maps, the last checkpoint and results go to W&B too
    # Further services, through Accelerate; those that write files do so in the folder tracking of the run.
    also: tuple[
        Literal["tensorboard", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"], ...
    ] = ()


FreezableName = Literal["backbone", "encoder", "decoder", "all_but_alpha_and_heads"]
CheckpointedName = Literal["backbone", "encoder"]


class Train(Section):
    # A run, a name or a file whose weights training starts from, instead of those of model.backbone.weights.
    start: str | None = None
    freeze: tuple[FreezableName, ...] = ()  # parts that are not trained; dropout in them stays as it is
    epochs: int = Field(300, ge=1)
    # Updates of an epoch, whatever the number of images, which come in one permutation after the other; None: one pass
    # over the data, without the images that fill no batch.
    epoch_updates: int | None = Field(None, ge=1, le=10**6)
    batch_size: int = Field(16, ge=1)  # over all processes: results do not depend on their number
    # Images that a process has on its device at a time, the last ones fewer where it does not divide a batch: gradients
    # add up to those of the batch. None: all at once; auto: the most that fit on the GPU, found by trying
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    # Parts whose activations are computed again in the backward pass rather than kept, layer by layer; true: both
    checkpoint_activations: bool | tuple[CheckpointedName, ...] = False
    # Forward and backward passes by torch.compile, in training and its evaluation: minutes at the start, and again when
    # the size of batches first changes. Needs a C++ compiler on a CPU, where it does not pay: shapes trains
    # at 0.8 of the speed (AMD EPYC Zen 4, one thread).
    compile: bool = False
    lr: float = Field(1e-4, gt=0.0)
    lr_backbone: float = Field(1e-5, ge=0.0)  # 0 is freeze: [backbone], as published code has it
    lr_alpha: float | None = Field(None, ge=0.0)  # None: 10 x lr
    lr_projections: float | None = Field(None, ge=0.0)  # sampling offsets, reference points; None: 0.1 x lr
    alpha_keeps_lr: bool = False  # the schedule leaves the alpha group alone
    weight_decay: float = Field(1e-4, ge=0.0)
    schedule: Literal["step", "cosine", "constant"] = "step"
    lr_drop: int = Field(200, ge=1)  # epochs until the step
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float = Field(0.1, ge=0.0)  # 0: no clipping
    precision: Literal["float32", "bfloat16"] = "float32"  # on a GPU float32 of convolutions is TF32, PyTorch's default
    ema: float = Field(0.0, ge=0.0, lt=1.0)  # decay of an exponential moving average of the weights; 0: none
    seed: int = Field(42, ge=0, lt=2**31)
    log_every: int = Field(50, ge=1)  # iterations
    eval_every: int = Field(1, ge=1)  # epochs; the last one is always evaluated
    keep_every: int = Field(0, ge=0)  # epochs between checkpoints that are kept for good; 0: only last and best
    # Minutes after which last.pt is written in the midst of an epoch, which a killed run then goes on from; 0: never.
    save_minutes: float = Field(30.0, ge=0.0)
    tracking: Tracking = Tracking()


def _with_cross(sites: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("decoder_cross", *sites)))


class Evaluate(Section):
    # The evaluator of AP: faster-coco-eval for everyday use, or the official code for a published number.
    engine: Literal["faster_coco_eval", "pycocotools"] = "faster_coco_eval"
    batch_size: int = Field(8, ge=1)  # per process
    examples: int = Field(8, ge=0)  # first images whose detections and attention maps are stored for figures
    store_maps: Annotated[int, Field(ge=0)] | Literal["all"] = 0  # more first images whose maps are stored, or all
    # Whose maps are stored; decoder_cross always, since examples are drawn with it.
    store_sites: Annotated[tuple[SiteName, ...], AfterValidator(_with_cross)] = ("decoder_cross",)
    # Whose attention is measured; decoder_cross always. Auto: where the transform is not softmax, since maps of an
    # encoder are large. Deformable attention of an encoder has none that could be measured.
    sites: Annotated[tuple[SiteName, ...], AfterValidator(_with_cross)] | Literal["auto"] = "auto"
    zero_threshold: float = Field(1e-6, ge=0.0)  # below it a softmax weight counts as zero in zeros_thresholded
    zero_share: float = Field(1e-3, ge=0.0)  # of the mean weight 1/K: below it a weight counts in zeros_relative
    confident_score: float = Field(0.5, ge=0.0, le=1.0)  # queries above it are measured as "confident"
    # A head has a sink in an image where a key gets more of its weight than this, mean over queries (arXiv 2410.10781);
    # counted too: than so many times 1/K, as if evenly spread over K keys; than so many times the second best key.
    sink_threshold: float = Field(0.3, ge=0.0, le=1.0)
    sink_even: float = Field(10.0, ge=1.0)
    sink_lead: float = Field(2.0, ge=1.0)
    count_padding: bool = False  # padded keys count in K, as in published Gini indices and zeros; false: left out
    paibb: Literal["exact", "thesis"] = "exact"  # "thesis": enlarged maps, whole pixels, as in published PAIBB


class Config(Section):
    data: Data = Data()
    model: Model = Detr()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _sections_agree(self):
        if fault := disagreement(self):
            raise ValueError(fault)
        return self
