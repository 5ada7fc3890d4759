"""Typed, frozen experiment settings.

A YAML file holds only what differs from the defaults below, and may name another file as its `base`.
Precedence, lowest first: defaults < base < file < dotted overrides. Unknown keys are errors.

    cfg = load_config("papermill_runs/configs/shapes.yaml", {"train.epochs": 2})
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from detrlib.model_settings import Model, Section

PROJECT = Path(__file__).resolve().parents[1]


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, or contradicts another; the message names it."""


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


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Settings from a YAML file (or the defaults) with dotted `overrides` such as {"train.epochs": 2}.

    A string override is read as YAML, so "1e-4" becomes a number and "[1, 2]" a list.
    Raises `ConfigError` naming the file and the setting, with the nearest valid name where one is unknown.
    """
    values = _read_yaml(project_path(path)) if path else {}
    for key, value in (overrides or {}).items():
        _check_known(key, "an override")
        _insert(values, key.split("."), parse_value(value))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path or 'config'}: {_explain(error)}") from None


def save_config(cfg: Config, path: Path) -> None:
    """The whole of `cfg`, defaults included, so that a run folder needs no other file to be understood."""
    path.write_text(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False))


def replace(cfg: Config, overrides: dict[str, Any]) -> Config:
    """A copy of `cfg` with dotted `overrides`, checked like a file."""
    values = cfg.model_dump(mode="json")
    for key, value in overrides.items():
        _check_known(key, "an override")
        _insert(values, key.split("."), parse_value(value))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def changed_settings(cfg: Config, base: Config) -> dict[str, Any]:
    """Dotted settings of `cfg` that differ from those of `base`."""
    mine, theirs = flat_settings(cfg), flat_settings(base)
    return {key: value for key, value in mine.items() if value != theirs[key]}


def flat_settings(section: Section, prefix: str = "") -> dict[str, Any]:
    """Every dotted setting of a section with its value, as JSON has it."""
    flat = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        nested = isinstance(value, Section)
        flat |= flat_settings(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def project_path(path: str | Path) -> Path:
    """`path` as given when absolute, otherwise from the project root, whatever the working directory is."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else PROJECT / path


def read_yaml(path: Path) -> dict:
    """A YAML mapping; numbers such as 1e-4 are numbers. Raises `ConfigError` naming the file."""
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.0)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings such as 'train: {{epochs: 2}}', found {type(values).__name__}")
    return values


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    if path in seen:
        raise ConfigError(f"{path}: 'base' refers back to itself through {', '.join(p.name for p in seen)}")
    values = {key: value for key, value in read_yaml(path).items() if value is not None}  # a section left empty
    if "runs" in values:
        raise ConfigError(f"{path}: a sweep of several runs, no settings of one; use python -m detrlib.sweep {path}")
    base = values.pop("base", None)
    for key in _dotted(values):
        _check_known(key, str(path))
    return _merge(_read_yaml(path.parent / base, (*seen, path)), values) if base else values


def _merge(low: dict, high: dict) -> dict:
    """`high` over `low`, section by section."""
    merged = dict(low)
    for key, value in high.items():
        nested = isinstance(value, dict) and isinstance(low.get(key), dict)
        merged[key] = _merge(low[key], value) if nested else value
    return merged


def _dotted(values: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return keys


def _insert(values: dict, path: list[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        values = values.setdefault(name, {})
    values[last] = value


def known_settings(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every dotted setting, for messages, documentation and completion."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += known_settings(field.annotation, f"{prefix}{name}.")
    return names


def _check_known(key: str, where: str) -> None:
    known = known_settings()
    if key in known:
        return
    last = key.split(".")[-1]
    near = difflib.get_close_matches(key, known, 1, 0.5)
    near = near or [k for k in known if k.split(".")[-1] in difflib.get_close_matches(last, [last, *_leaves(known)], 2)]
    hint = f"; did you mean '{near[0]}'?" if near else f"; sections are {', '.join(Config.model_fields)}"
    raise ConfigError(f"{where}: unknown setting '{key}'{hint}")


def _leaves(names: list[str]) -> list[str]:
    return [name.split(".")[-1] for name in names]


def parse_value(value: Any) -> Any:
    """Text as YAML reads it ("1e-4" is a number, "[1, 2]" a list); anything else as it is.

    Raises `ConfigError` for text that is no YAML.
    """
    if not isinstance(value, str):
        return value
    try:
        return yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{value!r} is not valid YAML: {error}") from None


def _explain(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"] if part in _leaves(known_settings()))
        given = "" if isinstance(fault["input"], dict | BaseModel) else f" (given {fault['input']!r})"
        message = fault["msg"].removeprefix("Value error, ")
        near = difflib.get_close_matches(str(fault["input"]), _choices(where), 1, 0.4) if given else []
        hint = f"; did you mean '{near[0]}'?" if near else ""
        lines.append(f"{where}: {message}{given}{hint}" if given else message)
    return "; ".join(dict.fromkeys(lines))


def _choices(setting: str) -> list[str]:
    section = Config
    *parents, last = setting.split(".")
    for name in parents:
        section = section.model_fields[name].annotation
    if last not in section.model_fields:
        return []
    annotation = section.model_fields[last].annotation
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    return [str(c) for part in parts for c in typing.get_args(part)]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; a float pattern of YAML 1.2 in front mends that."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)
