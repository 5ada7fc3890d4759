"""A model by any name that people have for one: a run, a name of published weights, an id or folder of Hugging Face,
a file; and a run folder around it.

    model = build_source(open_source("quickstart/softmax"))
    model = build_source(open_source("detr-r50"))
"""

import difflib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from detrlib.checkpoints.adapted import adapted_source
from detrlib.checkpoints.export import BY_SUFFIX, read_own
from detrlib.checkpoints.files import official_source
from detrlib.checkpoints.huggingface import FAMILIES, huggingface_source
from detrlib.checkpoints.source import Source, build_source
from detrlib.checkpoints.weights import ELSEWHERE, PUBLISHED, fetch
from detrlib.config import replace as replace_settings
from detrlib.config.huggingface import fetch_huggingface, read_json
from detrlib.data.classes import class_list
from detrlib.errors import ConfigError, RunError, WeightsError, shown
from detrlib.files import load_checkpoint, write_checkpoint, write_json
from detrlib.runs.folder import (
    RESERVED,
    RUNS,
    class_names,
    is_finished,
    load_results,
    name_fault,
    run_config,
    run_path,
)
from detrlib.runs.opening import begin_folder
from detrlib.runs.owner import OWNER, owning

logger = logging.getLogger(__name__)


def open_source(source: str | Path, checkpoint: str = "last", overrides: Mapping[str, Any] | None = None) -> Source:
    """Find weights by any of their names; no code in a file is run.

    Args:
        source: a run (name or folder), a name of published weights such as "detr-r50", a file or a folder, or an id of
            Hugging Face such as "facebook/detr-resnet-50"; looked for in this order.
        checkpoint: of a run: "last", "best", "epoch-0010" and so on.
        overrides: dotted settings that a file from elsewhere does not tell, such as {"model.num_heads": 4}.

    Raises:
        RunError: the run has no model, or no such checkpoint.
        WeightsError: there is nothing of this name; the message says which names are near. Or the file is damaged, of
            another model, or cannot be fetched.
        ConfigError: `overrides` make no sense, or are given for a run, which has settings of its own.
    """
    path, fault = Path(source).expanduser().absolute(), name_fault(source)
    run_dir = path if fault else run_path(source)
    if fault and not os.path.exists(path):  # of which the file system can be asked
        _refuse_near_names(str(source), fault)
    for folder in (run_dir, path):
        if (folder / "config.yaml").is_file():
            _no_overrides(folder, overrides)
            return run_source(folder, checkpoint)
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        _no_overrides(path, overrides)
        return run_source(path.parent.parent, path.stem)
    if str(source) in (*PUBLISHED, *ELSEWHERE):
        told = PUBLISHED[str(source)].settings if str(source) in PUBLISHED else {}
        return replace(official_source(fetch(str(source)), told | dict(overrides or {})), label=str(source))
    if path.suffix == ".safetensors" and path.is_file():
        _no_overrides(path, overrides)
        return read_own(path)
    if path.is_file():
        return official_source(path, overrides)
    if path.is_dir():
        return _of_huggingface(path, overrides)
    _refuse_near_names(str(source), None)
    return replace(_of_huggingface(fetch_huggingface(str(source)), overrides), label=str(source))


def _of_huggingface(folder: Path, overrides: Mapping[str, Any] | None) -> Source:
    """A folder of Hugging Face's: a model of this library where it has such, otherwise one of transformers'."""
    kind = read_json(folder / "config.json").get("model_type")
    return (huggingface_source if kind in FAMILIES else adapted_source)(folder, overrides)


def free_path(name: str | Path) -> Path:
    """The folder of a run that is to be made. Raises RunError if there is something in it."""
    run_dir = run_path(name)
    if run_dir.exists() and not (run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= {OWNER}):
        raise RunError(f"{run_dir} is there already; choose another run name, or delete the folder")
    return run_dir


@owning
def save_run(source: Source, run_dir: Path) -> None:
    """A run folder around weights, ready to be evaluated, after which it is like any other run's.

    Its results.json, empty of numbers until then, says that there is nothing to resume. Raises RunError where there
    is something in the folder.
    """
    free_path(run_dir)
    state = build_source(source).state_dict()
    classes = {"data.classes": class_list(source.names)} if source.names and not source.cfg.data.classes else {}
    begin_folder(run_dir, replace_settings(source.cfg, classes))
    write_checkpoint(run_dir / "checkpoints" / "last.pt", {"model": state, "epoch": source.epoch, "global_step": 0})
    write_json(run_dir / "results.json", {"imported": source.path.name}, checksum=True)


def _no_overrides(path: Path, overrides: Mapping[str, Any] | None) -> None:
    if overrides:
        raise ConfigError(f"{path}: {next(iter(overrides))} cannot be set: it has settings of its own")


def run_source(run_dir: Path, checkpoint: str = "last") -> Source:
    """The weights of a run, averaged ones where it keeps them; of an unfinished one it is said that it is.

    Raises RunError for a run that has no such checkpoint, or is made of another detector's predictions.
    """
    refuse_predictions(run_dir)
    cfg = run_config(run_dir)
    if cfg.model.num_classes is None:
        raise RunError(
            f"{run_dir / 'config.yaml'}: model.num_classes is missing, which every run has; is the file whole?"
        )
    path = run_dir / "checkpoints" / f"{checkpoint}.pt"
    content = load_checkpoint(path, ["model"])
    label = str(run_dir.relative_to(RUNS)) if run_dir.is_relative_to(RUNS) else run_dir.name
    epoch = content.get("epoch", 0)
    if not is_finished(run_dir):
        logger.warning("%s is unfinished: these are its weights of epoch %d of %d", label, epoch, cfg.train.epochs)
    names = class_names(run_dir) or None
    return Source(label, cfg, content.get("average") or content["model"], names, path, epoch)


def refuse_predictions(run_dir: Path) -> None:
    """Raise RunError where the results of a run are another detector's predictions, without a model."""
    results = load_results(run_dir) if (run_dir / "results.json").exists() else {}
    if made_of := results.get("detector"):
        raise RunError(
            f"{run_dir} is made of {made_of}: it has no model, and its results are complete; detections in other data "
            "make a run of their own (detrlib evaluate NAME --predictions FILE --data DATA)"
        )


def _refuse_near_names(name: str, fault: str | None) -> None:
    """Raise WeightsError for what is no id of Hugging Face's, or is more likely a misspelt name of something here.

    fault: why it cannot be the name of a run.
    """
    runs = [file.parent.relative_to(RUNS) for file in sorted(RUNS.glob("**/config.yaml"))]
    known = [str(run) for run in runs if run.name not in RESERVED] + [*PUBLISHED, *ELSEWHERE]
    if name.endswith(tuple(filter(None, BY_SUFFIX))) or name.startswith(("/", "~", ".")):
        raise WeightsError(
            f"{name!r}: there is no such file, folder or run; published weights are {', '.join(PUBLISHED)}"
        )
    if fault:
        raise WeightsError(f"nothing is named {shown(name)}; nor can it be a run: {fault}")
    an_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    near = difflib.get_close_matches(name, known, 3, 0.8 if an_id else 0.5)
    if an_id and not near:
        return
    hint = f"did you mean {' or '.join(near)}?" if near else f"published weights are {', '.join(PUBLISHED)}."
    raise WeightsError(
        f"nothing is named {name!r}; {hint} A run (under {RUNS}), a name of published weights, a file, a folder, or an "
        "id of Hugging Face (owner/name) will do"
    )
