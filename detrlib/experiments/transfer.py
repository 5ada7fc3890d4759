"""Data that a run was not trained for, such as other photographs with other names of classes, made ready for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from detrlib.config import Config, project_path, replace
from detrlib.data.annotations import Annotations
from detrlib.data.classes import ClassMatch, match_classes, translate
from detrlib.data.formats import choose_split, find_splits, images_of
from detrlib.data.index import read_columns
from detrlib.data.pictures import pictures_folder
from detrlib.engine.evaluate import evaluate_into, evaluation_config, results_folder
from detrlib.errors import ConfigError, DataError, RunError
from detrlib.files import write_json
from detrlib.runs.folder import class_names
from detrlib.runs.owner import owning

LOWER_BOUND = (
    "Only the classes in 'matched' are scored. Where the data does not annotate every object of them, right detections "
    "of the others count as false, and AP is a lower bound."
)


@owning
def evaluate_on(
    run_dir: Path,
    on: Path,
    checkpoint: str = "last",
    split: str | None = None,
    *,
    images: Path | None = None,
    names: Mapping[str, str] | None = None,
    by_id: bool = False,
    save_as: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict:
    """Evaluate a run on other data; results go to a folder inside the run's.

    Classes are those of the run with the same name, after `names`. Only classes that both know are scored: objects of
    theirs without partner (`unmapped` in the results) are left out, and so are detections of the model's classes that
    the data does not annotate (`unannotated`), since nobody has looked for those objects and they must not count as
    false.

    Args:
        run_dir, checkpoint, overrides: as of `evaluate_run`.
        on: a folder that `formats` knows, YOLO's data.yaml, or a COCO annotation file.
        split: of the folder; None: that of the run's validation where the folder has it, otherwise the only one.
        images: the folder of its pictures, by default near the annotation file.
        names: {their name: our name}, see `match_classes`.
        by_id: categories are those of the run with the same id instead, whatever their names.
        save_as: the folder for the results, named after the data by default.

    Returns:
        What results.json holds, see `evaluate`, and besides `on` (the annotation file), `matched` {their class: ours},
        `unmapped` {their class: number of objects}, `unannotated` (our classes), `note`.

    Raises:
        DataError, ConfigError, RunError: before anything is written, and as `evaluate_run`.
    """
    cfg = evaluation_config(run_dir, overrides)
    on, images = project_path(on), images and project_path(images)
    images, annotations = find_data(on, images, split, cfg.data.val_split)
    named = on.stem.removeprefix("instances_")
    if on != annotations:
        named = "-".join(filter(None, ((on.parent if on.is_file() else on).name, split)))
    folder = results_folder(run_dir, save_as or named, annotations)
    content = read_columns(annotations).content()
    ours = class_names(run_dir)
    match = _match(run_dir, cfg, annotations, content, ours, names or {}, by_id)
    with Accelerator().main_process_first():  # the others find their copy there
        cfg = with_classes(cfg, images, content, match, (folder / annotations.name).with_suffix(".json"))
    described = {
        "on": str(annotations),
        "names": {str(label): name for label, name in (ours or match.names).items()},
        "matched": match.matched,
        "unmapped": match.unmapped,
        "unannotated": match.unannotated,
        "note": LOWER_BOUND,
    }
    return evaluate_into(folder, run_dir, cfg, checkpoint, described)


def with_classes(cfg: Config, images: Path, content: Annotations, match: ClassMatch, copy: Path) -> Config:
    """Settings with other data for validation, written to `copy` with the labels of the model as category ids."""
    write_json(copy, translate(content, match))
    settings = {"data.val_images": str(images), "data.val_annotations": str(copy)}
    settings |= {"data.val_limit": None, "data.holdout": None, "data.contiguous": False, "data.classes": None}
    return replace(cfg, settings)


def find_data(data: Path, images: Path | None, split: str | None, usual: str) -> tuple[Path, Path]:
    """Image folder and annotations of other data: of a folder, or of YOLO's data.yaml, or a COCO annotation file.

    Of a folder `split` is taken; if that is None, the `usual` one where it is there, otherwise the only one.
    Pictures of a file are where `pictures_folder` finds them. Raises DataError, and ConfigError for a split of a file.
    """
    if data.suffix != ".json":
        there = find_splits(data)
        split = split or (next(iter(there)) if len(there) == 1 else usual)
        annotations = choose_split(data, split, "choose one (split, --split)")
        return images or images_of(annotations), annotations
    if split:
        raise ConfigError(f"split {split} (--split) belongs to a folder; {data} is one annotation file")
    first, remedy = read_columns(data).images.names[0], "give their folder (images, --images)"
    return pictures_folder(data, first, images, remedy), data


def _match(
    run_dir: Path,
    cfg: Config,
    path: Path,
    content: Annotations,
    ours: Mapping[int, str],
    names: Mapping[str, str],
    by_id: bool,
) -> ClassMatch:
    """The classes of `content` as those of the run, `ours`; raises where that cannot be."""
    if by_id and (names or cfg.data.contiguous):
        reason = "it takes no names" if names else "with data.contiguous a run's labels are no category ids"
        raise ConfigError(f"by_id (--by-id): {reason}; match classes by name instead")
    if not (ours or by_id):
        raise RunError(
            f"{run_dir} has no names of classes; evaluate the run on its own data first, "
            "or match by_id (--by-id) if the category ids of the other data are those the run was trained with"
        )
    try:
        match = match_classes(content, ours, names, by_id=by_id)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    classes = cfg.model.num_classes or 0
    if by_id and max(match.labels) >= classes:
        raise DataError(f"{path}: category id {max(match.labels)}; the run knows 0 to {classes - 1}")
    return match


def scored_classes(results: dict) -> str:
    """In words, what was scored on other data, and what was not."""
    renamed = [f"{theirs} = {ours}" for theirs, ours in results["matched"].items() if theirs != ours]
    lost = [f"{name} ({count} objects)" for name, count in results["unmapped"].items()]
    return "\n".join(
        [
            f"{len(results['matched'])} classes scored" + (f", {', '.join(renamed)}" if renamed else ""),
            f"not classes of the run, left out: {', '.join(lost) or 'none'}",
            f"not annotated there, their detections left out: {', '.join(results['unannotated']) or 'none'}",
            results["note"],
        ]
    )
