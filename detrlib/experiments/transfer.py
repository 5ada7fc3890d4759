"""Data that a run was not trained for, such as other photographs with other names of classes, made ready for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detrlib.config import Config, project_path, replace
from detrlib.data.classes import ClassMatch, locate, match_classes, match_ids, translate
from detrlib.data.coco import read_annotations
from detrlib.engine.evaluate import evaluate_into, evaluation_config
from detrlib.errors import ConfigError, DataError, RunError
from detrlib.files import write_json
from detrlib.runs.folder import RESERVED, load_results

LOWER_BOUND = (
    "Only the classes in 'matched' are scored. Where the data does not annotate every object of them, right detections "
    "of the others count as false, and AP is a lower bound."
)


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
        on: a COCO-format folder (whose `split` is taken) or an annotation file.
        images: the folder of its pictures, by default near the annotation file.
        names: {their name: our name}, see `match_classes`.
        by_id: categories are those of the run with the same id instead, whatever their names.
        save_as: the folder for the results, named after the data by default.

    Raises:
        DataError, ConfigError, RunError: before anything is written, and as `evaluate_run`.
    """
    cfg = evaluation_config(run_dir, overrides)
    on, images = project_path(on), images and project_path(images)
    if on.suffix == ".json" and split:
        raise ConfigError(f"split {split} belongs to a folder; {on} is one annotation file")
    images, annotations = locate(on, images, split, cfg.data.val_split)
    named = on.stem.removeprefix("instances_") if on == annotations else "-".join(filter(None, (on.name, split)))
    folder = _folder(run_dir, save_as or named, annotations)
    content = read_annotations(annotations)
    ours = {int(label): name for label, name in load_results(run_dir).get("names", {}).items()}
    if by_id:
        found = _by_id(cfg, annotations, content, ours, named=bool(names))
    else:
        found = _by_name(run_dir, annotations, content, ours, names or {})
    copy = folder / annotations.name  # with the run's labels as category ids
    write_json(copy, translate(content, found))
    settings = {"data.val_images": str(images), "data.val_annotations": str(copy)}
    settings |= {"data.val_limit": None, "data.contiguous": False}
    described = {
        "on": str(annotations),
        "names": {str(label): name for label, name in (ours or found.names).items()},
        "matched": found.matched,
        "unmapped": found.unmapped,
        "unannotated": found.unannotated,
        "note": LOWER_BOUND,
    }
    return evaluate_into(folder, run_dir, replace(cfg, settings), checkpoint, described)


def _folder(run_dir: Path, name: str, annotations: Path) -> Path:
    folder = run_dir / name
    if folder.parent != run_dir or folder.name in ("..", *RESERVED):
        raise RunError(f"{folder.name!r} cannot name a folder of results in {run_dir}; choose another (save_as, --as)")
    if (folder / "results.json").exists() and load_results(folder).get("on") != str(annotations):
        raise RunError(f"{folder} holds results on other data; choose another name (save_as, --as)")
    return folder


def _by_id(cfg: Config, path: Path, content: dict, ours: Mapping[int, str], named: bool) -> ClassMatch:
    if named or cfg.data.contiguous:
        reason = "it takes no names" if named else "with data.contiguous a run's labels are no category ids"
        raise ConfigError(f"by_id (--by-id): {reason}; match classes by name instead")
    found = match_ids(content, ours)
    if max(found.labels) >= (cfg.model.num_classes or 0):
        raise DataError(f"{path}: category id {max(found.labels)}; the run knows 0 to {cfg.model.num_classes - 1}")
    return found


def _by_name(run_dir: Path, path: Path, content: dict, ours: Mapping[int, str], names: Mapping[str, str]) -> ClassMatch:
    if not ours:
        raise RunError(
            f"{run_dir / 'results.json'} has no 'names' of classes; evaluate the run on its own data first, "
            "or match by_id (--by-id) if the category ids of the other data are those the run was trained with"
        )
    try:
        return match_classes(content, ours, names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


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
