"""Data that a run was not trained for, such as other photographs with other names of classes, made ready for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from detrlib.config import Config, ConfigError, project_path, replace
from detrlib.data import DataError
from detrlib.data.coco import read_annotations
from detrlib.data.mapping import ClassMatch, locate, match_classes, match_ids, translate
from detrlib.runs import RunError, load_results, write_json

RESERVED = ("checkpoints", "examples", "maps", "measures", "untrained")  # folders of a run
LOWER_BOUND = (
    "Only the classes in 'matched' are scored. Where the data does not annotate every object of them, right detections "
    "of the others count as false, and AP is a lower bound."
)


@dataclass(frozen=True)
class OtherData:
    """Where the data is and how its classes are found; the choices of `evaluate_run`."""

    on: Path  # a COCO-format folder, or an annotation file
    images: Path | None = None
    split: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)  # their name -> our name
    by_id: bool = False
    save_as: str | None = None


def prepare(run_dir: Path, cfg: Config, other: OtherData) -> tuple[Config, Path, dict]:
    """The settings of a run with the other data, the folder for its results, and what these are to say of classes.

    Writes the annotations with the run's labels as category ids into that folder. Raises DataError, ConfigError or
    RunError before anything is written.
    """
    on, images = project_path(other.on), other.images and project_path(other.images)
    if on.suffix == ".json" and other.split:
        raise ConfigError(f"split {other.split} belongs to a folder; {on} is one annotation file")
    images, annotations = locate(on, images, other.split, cfg.data.val_split)
    folder = _folder(run_dir, on, annotations, other)
    content = read_annotations(annotations)
    ours = {int(label): name for label, name in load_results(run_dir).get("names", {}).items()}
    if other.by_id:
        found = _by_id(cfg, annotations, content, ours, other)
    else:
        found = _by_name(run_dir, annotations, content, ours, other)
    copy = folder / annotations.name
    write_json(copy, translate(content, found))
    settings = {"data.val_images": str(images), "data.val_annotations": str(copy)}
    settings |= {"data.val_limit": None, "data.contiguous": False}  # the labels are the category ids of the copy
    described = {
        "on": str(annotations),
        "names": {str(label): name for label, name in (ours or found.names).items()},
        "matched": found.matched,
        "unmapped": found.unmapped,
        "unannotated": found.unannotated,
        "note": LOWER_BOUND,
    }
    return replace(cfg, settings), folder, described


def split_folder(run_dir: Path, split: str) -> Path:
    """Where results of another split of the run's own data go. Raises RunError where that is taken."""
    folder = run_dir / split
    if folder.parent != run_dir or folder.name in ("..", *RESERVED):
        raise RunError(f"{split!r} cannot name a folder of results in {run_dir}; name a split of the run's data")
    if (folder / "results.json").exists() and "on" in load_results(folder):
        raise RunError(f"{folder} holds results on other data; move that folder away first")
    return folder


def _folder(run_dir: Path, on: Path, annotations: Path, other: OtherData) -> Path:
    named = on.stem.removeprefix("instances_") if on == annotations else "-".join(filter(None, (on.name, other.split)))
    folder = run_dir / (other.save_as or named)
    if folder.parent != run_dir or folder.name in ("..", *RESERVED):
        raise RunError(f"{folder.name!r} cannot name a folder of results in {run_dir}; choose another (save_as, --as)")
    if (folder / "results.json").exists() and load_results(folder).get("on") != str(annotations):
        raise RunError(f"{folder} holds results on other data; choose another name (save_as, --as)")
    return folder


def _by_id(cfg: Config, path: Path, content: dict, ours: Mapping[int, str], other: OtherData) -> ClassMatch:
    if other.names or cfg.data.contiguous:
        reason = "it takes no names" if other.names else "with data.contiguous a run's labels are no category ids"
        raise ConfigError(f"by_id (--by-id): {reason}; match classes by name instead")
    found = match_ids(content, ours)
    if max(found.labels) >= (cfg.model.num_classes or 0):
        raise DataError(f"{path}: category id {max(found.labels)}; the run knows 0 to {cfg.model.num_classes - 1}")
    return found


def _by_name(run_dir: Path, path: Path, content: dict, ours: Mapping[int, str], other: OtherData) -> ClassMatch:
    if not ours:
        raise RunError(
            f"{run_dir / 'results.json'} has no 'names' of classes; evaluate the run on its own data first, "
            "or match by_id (--by-id) if the category ids of the other data are those the run was trained with"
        )
    try:
        return match_classes(content, ours, other.names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
