"""Settings of a detector of Hugging Face's transformers: which one, and the transforms that are put into it.

Its sizes stand in a configuration of transformers: in `options`, where a run keeps all of them, so that to read one
needs neither transformers nor the network; or still to be asked for, which needs transformers, and for the id of a
`source` its config.json.
"""

import difflib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from detrlib.config.attention import Attention, SiteName
from detrlib.config.model import Attending
from detrlib.errors import ConfigError, WeightsError, in_one_line

Kind = Literal["detr", "conditional_detr", "dab_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"]
KINDS = get_args(Kind)
SQUARE = ("rt_detr", "rt_detr_v2", "d_fine")  # take images of one size, pixels in 0..1, and no mask
POINTS = {"deformable_detr": ("encoder_self", "decoder_cross")} | dict.fromkeys(SQUARE, ("decoder_cross",))
COMPLETE = "transformers_version"  # stands in configurations that transformers has written
# Parts of every configuration that follow from other settings here, or from the data, or change nothing.
NOT_OPTIONS = {
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder"),
    *("label2id", "model_type", "num_labels", "output_attentions", "output_hidden_states", "problem_type"),
    *("return_dict", "torch_dtype", "use_timm_backbone", "use_pretrained_backbone", "backbone", "backbone_kwargs"),
}
BASIC, BOTTLENECK = ("basic", [64, 128, 256, 512]), ("bottleneck", [256, 512, 1024, 2048])
RESNETS = {  # kind, channels and number of blocks of each stage
    "resnet18": (*BASIC, [2, 2, 2, 2]),
    "resnet34": (*BASIC, [3, 4, 6, 3]),
    "resnet50": (*BOTTLENECK, [3, 4, 6, 3]),
    "resnet101": (*BOTTLENECK, [3, 4, 23, 3]),
}
INSTALL = 'pip install "detrlib[huggingface]"'
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
OLDEST = 5  # major version of transformers whose modules look up their attention


def require_transformers() -> None:
    """Make sure that transformers is there and new enough. Raises ConfigError that says how to get it."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"detectors of Hugging Face need its library transformers: {INSTALL}") from None
    if int(transformers.__version__.split(".")[0]) < OLDEST:
        raise ConfigError(f"transformers {transformers.__version__} is too old, {OLDEST}.0 is needed: {INSTALL} -U")


class HuggingFace(Attending):
    """Trained by the losses of this library, without the denoising queries that RT-DETR and D-FINE have in training."""

    architecture: Literal["huggingface"] = "huggingface"
    # A folder, or an id such as PekingU/rtdetr_v2_r18vd: its configuration, and the weights that training starts from.
    source: str | None = None
    type: Kind | None = None  # without a source: weights are drawn at random
    # Of transformers' configuration, where not as in the source, or as is the rule for the type.
    options: dict[str, Any] = Field(default_factory=dict)
    square: int = Field(640, ge=32, le=2**14, multiple_of=32)  # side that images are resized to, of types that need one
    # Stem and first stage of the backbone, as DETR and its kin have it; None: if these have weights of a source to keep
    freeze_stem: bool | None = None
    attention: Attention = Attention()

    @model_validator(mode="after")
    def _is_some_model(self):
        if self.source is None and self.type is None:
            raise ValueError(
                f"model.source or model.type is needed: a folder or id of Hugging Face's, or one of {', '.join(KINDS)}"
            )
        if wrong := [name for name in self.options if name in NOT_OPTIONS]:
            raise ValueError(f"model.options.{wrong[0]} follows from the other settings and the data; leave it out")
        return self

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """The whole of transformers' configuration, with the type under "type"."""
        if COMPLETE in self.options:
            return self.options | {"type": self.type}
        return complete(self.source, self.type, self.options)

    def completed(self) -> "HuggingFace":
        """The same with all options, as a run keeps them. Raises as `complete`."""
        return self.model_copy(update={"type": self.configuration["type"], "options": self.options_in_full()})

    def options_in_full(self) -> dict[str, Any]:
        """Those that are not given too, as in the source or by the rule for the type. Raises as `complete`."""
        return {name: value for name, value in self.configuration.items() if name != "type"}

    @property
    def kind(self) -> Kind:
        """The type, that of the source included."""
        return self.type or self.configuration["type"]

    @property
    def encoder_layers(self) -> int:
        """Number of layers."""
        return self.configuration["encoder_layers"]

    @property
    def decoder_layers(self) -> int:
        """Number of layers."""
        return self.configuration["decoder_layers"]

    @property
    def num_heads(self) -> int:
        """Of the decoder's attention, and as a rule of the encoder's."""
        return self.configuration["decoder_attention_heads"]

    @property
    def stem_is_frozen(self) -> bool:
        """Whether stem and first stage of the backbone are not trained. RT-DETR and D-FINE train all of it."""
        kept = self.source is not None and self.kind not in SQUARE
        return kept if self.freeze_stem is None else self.freeze_stem

    @property
    def num_queries(self) -> int:
        """How many boxes are predicted in every image."""
        proposed = self.configuration.get("two_stage")
        return self.configuration["two_stage_num_proposals" if proposed else "num_queries"]

    @property
    def classification(self) -> Literal["softmax", "sigmoid"]:
        """How classes are said; softmax has a no-object class."""
        return "softmax" if self.kind == "detr" else "sigmoid"

    @property
    def proposal_head(self) -> int | None:
        """As of `Attending`."""
        return self.decoder_layers if self.configuration.get("two_stage") else None

    @property
    def padding_matters(self) -> bool:
        """As of `Attending`: what transformers sees has no padding."""
        return False

    def scores_keys(self, site: SiteName) -> bool:
        """As of `Attending`."""
        return site not in POINTS.get(self.kind, ())

    def transform_at(self, site: SiteName) -> str:
        """As of `Attending`; where points are sampled, a transform other than softmax weighs the points of a query."""
        name = getattr(self.attention, site)
        return name if name != "softmax" or self.scores_keys(site) else "deformable"


def complete(source: str | None, kind: Kind | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The whole of a configuration of transformers, with the type under "type".

    Raises:
        ConfigError: transformers is not installed, or an option is none of the type's, or of a wrong kind.
        WeightsError: the source is not there, cannot be fetched, or is no model of a known type.
    """
    told = {} if source is None else read_json(source_folder(source) / "config.json")
    found = str(told.get("model_type", kind)).replace("-", "_")
    if found not in KINDS:
        raise WeightsError(f"model.source {source}: model_type is {found!r}; there are {', '.join(KINDS)}")
    if kind not in (None, found):
        raise ConfigError(f"model.type {kind}: {source} is of type {found}; leave model.type out")
    backbone = told.get("backbone_config") or {}
    if found not in SQUARE and backbone.get("model_type", "timm_backbone") == "timm_backbone":
        told = told | {"backbone_config": _resnet(f"model.source {source}", found, told | backbone)}
    theirs = their_config(found, _merged({n: v for n, v in told.items() if n not in NOT_OPTIONS}, options))
    return _options(theirs.to_dict()) | {"type": found}


def their_config(kind: Kind, options: Mapping[str, Any], **others: Any) -> Any:
    """The configuration of transformers of some type; others: names that are no options, such as num_labels.

    Raises ConfigError as `complete`.
    """
    require_transformers()
    import transformers

    theirs = transformers.CONFIG_MAPPING[kind.replace("dab_", "dab-")]
    try:
        known = theirs().to_dict()
        if wrong := [name for name in options if name not in known and name not in theirs.attribute_map]:
            near = difflib.get_close_matches(wrong[0], known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"transformers' {theirs.__name__} has none of that name"
            raise ConfigError(f"model.options.{wrong[0]}: unknown to {kind}; {hint}")
        if kind in SQUARE and "backbone_config" in options:
            # Stages are told by their names; what else follows from these is not kept when they change.
            default = {
                n: value for n, value in known["backbone_config"].items() if n not in ("out_indices", "stage_names")
            }
            options = _merged({"backbone_config": default}, options)
        return theirs(**options, **others)
    except ConfigError:
        raise
    except Exception as error:  # of transformers, which checks types in its own way
        raise ConfigError(f"model.options: transformers refuses them for {kind}: {in_one_line(error)}") from None


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`, and so within mappings that both have, unless they are of another kind of model."""
    merged = dict(low)
    for name, value in high.items():
        before = merged.get(name)
        same = isinstance(before, Mapping) and isinstance(value, Mapping)
        same = same and value.get("model_type", before.get("model_type")) == before.get("model_type")
        merged[name] = _merged(before, value) if same else value
    return merged


def _options(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a written configuration, that of its backbone included."""
    backbone = configuration["backbone_config"]
    own = {name: value for name, value in backbone.items() if name not in NOT_OPTIONS or name == "model_type"}
    options = {name: value for name, value in configuration.items() if name not in NOT_OPTIONS}
    return json.loads(json.dumps(options | {"backbone_config": own}))  # lists for tuples, as a file has them


def _resnet(where: str, kind: Kind, told: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of transformers' own ResNet, in place of timm's, or of none. Raises WeightsError for others."""
    name = str(told.get("backbone") or "resnet50").partition(".")[0]
    if name not in RESNETS or told.get("dilation") or told.get("output_stride") == 16:
        raise WeightsError(
            f"{where}: its backbone {name} (dilation {told.get('dilation')}) is one of timm's, and transformers has it "
            f"not itself, only {', '.join(RESNETS)} without dilation; name another source"
        )
    layer, widths, depths = RESNETS[name]
    several = kind == "deformable_detr" and told.get("num_feature_levels", 4) > 1
    stages = ["stage2", "stage3", "stage4"] if several else ["stage4"]
    sizes = {"layer_type": layer, "hidden_sizes": widths, "depths": depths, "embedding_size": 64}
    return {"model_type": "resnet", **sizes, "out_features": stages}


# --- folders of Hugging Face's -------------------------------------------------------------------------------------


def source_folder(source: str, weights: bool = False) -> Path:
    """The folder of a source, fetched once where it is an id; weights: with its weights.

    Raises WeightsError: one sentence with the address, the folder of the cache, what went wrong and what to do.
    """
    from detrlib.config.load import project_path

    for folder in (project_path(source), Path(source).expanduser()):
        if folder.is_dir():
            return folder
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise WeightsError(f"{source!r}: no such folder, nor is it an id of Hugging Face's (owner/name)")
    return fetch_huggingface(source, weights)


def fetch_huggingface(name: str, weights: bool = True) -> Path:
    """The folder of a model of Hugging Face's hub by its id. Raises as `source_folder`."""
    import huggingface_hub as hub  # a second that only ids need

    wanted = {"repo_id": name, "allow_patterns": ["config.json", PREPROCESSOR, *WEIGHTS[: int(weights)]]}
    needed = WEIGHTS if weights else ("config.json",)
    try:
        try:
            folder = Path(hub.snapshot_download(**wanted, local_files_only=True))
            if any((folder / file).is_file() for file in needed):
                return folder  # without asking, so that it works offline
        except hub.errors.LocalEntryNotFoundError:
            pass
        folder = Path(hub.snapshot_download(**wanted))
        if weights and not (folder / WEIGHTS[0]).is_file():
            hub.snapshot_download(name, allow_patterns=[WEIGHTS[1]])
    except Exception as error:  # the hub's client passes on whatever its transport raises
        address, cache = f"{hub.constants.ENDPOINT}/{name}", hub.constants.HF_HUB_CACHE
        reason = in_one_line(error).partition(". ")[0].rstrip(".")
        raise WeightsError(
            f"{name}: nothing here, and could not be fetched from {address} into {cache}: {reason}. Try again, or "
            f"put config.json and {WEIGHTS[0]} into a folder by other means and give that folder"
        ) from None
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A file of Hugging Face's. Raises WeightsError naming it."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"no file {path}; a folder of Hugging Face's has one") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: holds a {type(config).__name__}, expected settings of a model")
    return config
