"""What a person should know of his settings and results, and what to do about it: a line each, none where all is well.

What there is to say of data alone stands in `detrlib.data.findings`, and of memory in `memory`.
"""

from collections.abc import Mapping
from typing import get_args

from torch import nn

from detrlib.config import Config, Data
from detrlib.config.attention import OF_TRANSFORMS, WITHOUT_NULL_KEY, SiteName
from detrlib.data import CocoDataset
from detrlib.data.objects import suggested_image_sizes
from detrlib.engine.start import learns_from_crops
from detrlib.metrics.collapse import signs_of_collapse
from detrlib.metrics.detection import UNDEFINED
from detrlib.metrics.sinks import AGREED, RESTS
from detrlib.models import backbone_view

FEW_UPDATES, MEASURED_UPDATES = 500, "of 32 drawn pictures each, 400 give AP 0.42 and 1,000 give 0.67"
FEW_OBJECTS = 500
MEASURED_OBJECTS = "with 173 AP stays within 0.05 of a fixed box, and is 0.1 above it from a detector of drawn shapes"
PLACES = (
    ("upper left", "top", "upper right"),
    ("left", "middle", "right"),
    ("lower left", "bottom", "lower right"),
)
DOES = {"nothing": ", so that it does nothing", "broadcast": ", so that all queries are given it"}
MUCH_PADDING = 0.5  # share of the pixels of batches


def few_updates(cfg: Config, updates: int) -> list[str]:
    """A budget of so few updates that little can be learned from scratch."""
    if cfg.train.start or getattr(cfg.model, "source", None) or updates >= FEW_UPDATES:
        return []
    return [
        f"warning: {updates} updates in all (train.epochs {cfg.train.epochs}) are few for a detector from scratch "
        f"({MEASURED_UPDATES}); raise train.epochs, or train.epoch_updates (updates of an epoch), or begin with the "
        "weights of a detector (train.start)"
    ]


def idle_settings(cfg: Config) -> list[str]:
    """Settings of attention that change nothing, as the others are."""
    model, lines = cfg.model, []
    sites = [site for site in get_args(SiteName) if site != "encoder_self" or model.encoder_layers]
    used = {site: model.transform_at(site) for site in sites}
    for name, field in type(model.attention).model_fields.items():
        value, transforms = getattr(model.attention, name), OF_TRANSFORMS.get(name)
        if transforms and value != field.default and transforms.isdisjoint(used.values()):
            lines.append(
                f"model.attention.{name} {value} changes nothing: no site has {' or '.join(sorted(transforms))}"
            )
    for site, transform in used.items():
        if transform in WITHOUT_NULL_KEY.get(key := model.null_key_at(site), ()):
            lines.append(f"model.attention.null_key {key} at {site} changes no weight of {transform}")
    if "encoder_self" in cfg.evaluate.sites and not ("encoder_self" in sites and model.scores_keys("encoder_self")):
        why = "points are sampled there" if "encoder_self" in sites else "model.encoder_layers is 0"
        lines.append(f"evaluate.sites encoder_self is not measured: {why}")
    return [f"warning: {line}" for line in lines]


def divided_statistics(model: nn.Module, at_a_time: int, batch_size: int) -> list[str]:
    """Batch norms that see a part of a batch."""
    if at_a_time >= batch_size or not getattr(model, "learns_statistics", bool)():
        return []
    return [
        f"warning: batch norms of this model learn means and variances from {at_a_time} images at a time, not from the "
        f"{batch_size} of a batch: results depend on train.micro_batch and on the number of processes, and few images "
        "make them coarse. model.options.freeze_backbone_batch_norms and train.freeze keep those of trained weights"
    ]


def unfit_for_crops(cfg: Config, train_set: CocoDataset) -> list[str]:
    """Objects too few, or too large, for a backbone that learns from crops of them, where the model begins with one."""
    if not learns_from_crops(cfg):
        return []
    lines, sides, size = [], train_set.object_sides(), cfg.data.image_size
    stride, view = backbone_view(cfg.model)
    if len(sides) < FEW_OBJECTS:
        lines.append(
            f"warning: {len(sides)} objects are few for weights from crops ({MEASURED_OBJECTS}); begin with trained "
            "ones: train.start, as in papermill_runs/configs/large-objects.yaml, or a backbone with "
            "model.backbone.weights: imagenet"
        )
    middle = round(size * sides.median().item())
    if middle > view:
        smallest, largest = suggested_image_sizes(sides, stride, view)
        better = f"{smallest} to {largest}" if smallest < largest else f"{largest} for the large ones"
        lines.append(
            f"warning: at data.image_size {size} half of the objects are longer than {middle} pixels, of which a cell "
            f"of the backbone {cfg.model.backbone.name} sees {view}: set data.image_size to {better}"
        )
    return lines


def much_padding(share: float, settings: Data) -> list[str]:
    """Batches more than half of whose pixels are padding."""
    if share <= MUCH_PADDING:
        return []
    remedy = "images differ in shape, of which smaller batches (train.batch_size) have less"
    if settings.scales == "image" and settings.augment == "detr":
        remedy = "data.scales: batch draws sizes once for a batch, which is faster and no longer the published recipe"
    return [f"{share:.0%} of the pixels of batches are padding: {remedy}"]


def floor_and_collapse(results: Mapping) -> list[str]:
    """The floor of results, and what looks collapsed in them; none for what they do not hold."""
    lines = []
    numbers = results.get("floor", {"AP": UNDEFINED})
    if numbers["AP"] != UNDEFINED:
        reached = f"AP {numbers['AP']:.3f}  AP50 {numbers['AP50']:.3f}, on {numbers['images']} images"
        lines.append(f"the floor: boxes that are the same in every image reach {reached}")
    return [*lines, *(f"warning: {line}" for line in signs_of_collapse(results).values())]


def where_attention_rests(results: Mapping) -> list[str]:
    """A line for each site of which some head rests on one key in most images, with the head that does so most."""
    limit = results.get("evaluate", {}).get("sink_threshold")
    lines = []
    for site, found in results.get("sinks", {}).items():
        heads = [(layer, head) for layer, row in enumerate(found["sink"]["heads"]) for head in range(len(row))]
        resting = [(layer, head) for layer, head in heads if found["sink"]["heads"][layer][head] >= RESTS]
        if resting:
            same = sum(found["agreement"]["heads"][layer][head] >= AGREED for layer, head in resting)
            key = "query" if site == "decoder_self" else "cell"
            lines.append(
                f"sinks: {len(resting)} of {len(heads)} heads of {site} put more than {limit:g} of their weight on one "
                f"{key} in most images, {same} of them on the same; {_rests_most(found, resting, key)}"
            )
    return lines


def _rests_most(found: Mapping, heads: list[tuple[int, int]], key: str) -> str:
    """Of the head among `heads` (layer, head) that rests most, in words; found: of a site, as in results.json."""
    layer, head = max(heads, key=lambda at: found["weight"]["heads"][at[0]][at[1]])
    weight, agreement, norm = (found[name]["heads"][layer][head] for name in ("weight", "agreement", "value_norm"))
    row, column = (int(3 * min(part, 0.999)) for part in found["place"][layer][head])
    where = f", at the {PLACES[row][column]} of the image" if key == "cell" else ""
    value = ""
    if norm is not None:
        value = f"; its value there is {norm:.2g} times as large as others{DOES.get(found['does'][layer][head], '')}"
    words = f"most in layer {layer + 1}, head {head + 1}: {weight:.2f}"
    return f"{words}, in {agreement:.0%} of images on the same {key}{where}{value}"
