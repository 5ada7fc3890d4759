"""The weights that training starts from: drawn at random, or those of a run, a name or a file (`train.start`).

    detrlib train papermill_runs/configs/bccd.yaml --name cells --set train.start=quickstart/softmax
    detrlib train papermill_runs/configs/shapes.yaml --name longer --set train.start=quickstart/softmax

Everything must fit but for two things. Class heads over other classes are made anew, with the rows of classes of the
same name, and of no-object. And attention may have another transform: what the one of the source had learned is left
out (its alphas, for example), what the new one has to learn stays as initialised.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detrlib.checkpoints.adapted import adapted_source
from detrlib.config import Config, Model, flat_settings, project_path
from detrlib.config.huggingface import source_folder
from detrlib.data import CocoDataset, build_dataset
from detrlib.data.classes import find_label
from detrlib.engine.pretrain import backbone_weights
from detrlib.errors import ConfigError, WeightsError, listed
from detrlib.files import weight_faults, write_json
from detrlib.models import build_model, set_alphas
from detrlib.runs.sources import Source, open_source

# Class heads, and what detectors of transformers call theirs.
HEADS = re.compile(r"(model\.)*(decoder\.)?(class_embed|class_labels_classifier|enc_score_head)\.")
OF_TRANSFORM = ".transform."
# Once weights are given.
OF_NO_MATTER = ("model.num_classes", "model.source", "model.backbone.weights", "model.backbone.freeze_stem")


@dataclass(frozen=True)
class Start:
    """What was taken over from a source, entries of the state dict and classes by their names."""

    source: str
    loaded: list[str]  # entries
    remade: list[str]  # class heads: rows of classes that were kept, others as initialised
    initialised: list[str]  # entries of transforms that the source has not
    left_out: list[str]  # entries of transforms that the source alone has
    classes: dict[str, list[str]]  # kept, new, left_out
    names_known: bool  # those of the source; otherwise heads of the same size are taken for those of the same classes
    settings: dict[str, list]  # of the model where they differ: [there, here]

    def __str__(self) -> str:
        lines = [f"starts from {self.source}: {len(self.loaded)} of its entries loaded"]
        if not (self.names_known or self.remade):
            lines.append("what its classes are called is not known; they are taken for the same")
        if self.remade:
            lines.append(f"class heads made anew: {listed(self.remade, 4)}")
            for what, names in self.classes.items():
                lines.append(f"  classes {what.replace('_', ' ')}: {listed(names) or 'none'}")
        for what, names in (("as initialised", self.initialised), ("left out", self.left_out)):
            lines += [f"{what}: {listed(names, 2)}"] if names else []
        if self.settings:
            said = [f"{name} {here} (there {there})" for name, (there, here) in self.settings.items()]
            lines.append(f"settings that differ: {listed(said)}")
        return "\n    ".join(lines)


def learns_from_crops(cfg: Config) -> bool:
    """Whether the model begins with a backbone that learns from crops of the training data, and no other weights."""
    backbone, given = getattr(cfg.model, "backbone", None), cfg.train.start or getattr(cfg.model, "source", None)
    return backbone is not None and backbone.weights == "crops" and not given


def wanted_classes(cfg: Config, dataset: CocoDataset) -> int:
    """`model.num_classes`, or what the training data need. Raises ConfigError where it is too small for them."""
    wanted = cfg.model.num_classes or dataset.num_classes
    if wanted < dataset.num_classes:
        raise ConfigError(
            f"model.num_classes {wanted} is too small: {dataset.annotations_path} needs {dataset.num_classes}"
            + ("" if cfg.data.contiguous else " (largest category id + 1; data.contiguous: true renumbers them)")
        )
    return wanted


def initial_model(cfg: Config, weights: str | Path | None = None) -> nn.Module:
    """A model of random weights, which follow from cfg.train.seed alone; those of the backbone may be given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.train.seed)
        return build_model(cfg.model, weights)


def starting_model(cfg: Config, train_set: CocoDataset | None = None) -> tuple[nn.Module, Start | None]:
    """The model that training starts from, and what was taken over if there is a `train.start` or a `model.source`.

    Args:
        cfg: every setting, model.num_classes included.
        train_set: the data, which is opened if it is needed and not given.

    Raises:
        WeightsError: the source is missing or does not fit; all entries that do not are named.
    """
    theirs, crops = getattr(cfg.model, "source", None), learns_from_crops(cfg)
    given = cfg.train.start or theirs
    if train_set is None and (crops or given):
        train_set = build_dataset(cfg.data, "train")
    weights = backbone_weights(cfg.model.backbone, train_set, cfg.data.image_size) if crops else None
    model, start = initial_model(cfg, "none" if given else weights), None
    if cfg.train.start:
        file = project_path(cfg.train.start)
        source = open_source(file if os.path.isfile(file) else cfg.train.start)
        start = take_over(model, source, cfg.model, train_set.names)
    elif theirs:
        source = adapted_source(source_folder(theirs, weights=True))
        start = take_over(model, source, cfg.model, train_set.names)
    set_alphas(model, cfg.model.annealed_alphas(0))
    return model, start


def record_start(run_dir: Path, start: Start | None) -> None:
    """Write start.json, and remove that of an earlier attempt."""
    if start is None:
        (run_dir / "start.json").unlink(missing_ok=True)
    else:
        write_json(run_dir / "start.json", asdict(start))


def take_over(model: nn.Module, source: Source, settings: Model, names: Mapping[int, str]) -> Start:
    """Load the weights of a source into a model, as the head of this file says.

    Args:
        model: as initialised.
        source: the weights, and the settings and names of classes that they were trained with.
        settings: of the model.
        names: of its classes, by label.

    Raises:
        WeightsError: names all entries that do not fit.
    """
    if source.cfg.model.architecture != settings.architecture:
        raise WeightsError(
            f"train.start: {source.label} is of model.architecture {source.cfg.model.architecture}, the model to train "
            f"of {settings.architecture}; train with its settings, or from another source"
        )
    own, given = model.state_dict(), dict(source.state)
    initialised = [name for name in own if OF_TRANSFORM in name and name not in given]
    left_out = [name for name in given if OF_TRANSFORM in name and name not in own]
    differing = _differing(source.cfg.model, settings)
    if faults := weight_faults(_comparable(own, initialised), _comparable(given, left_out)):
        said = "; ".join(f"{name} {here}, there {there}" for name, (there, here) in differing.items())
        raise WeightsError(
            f"train.start: {source.label} does not fit in {len(faults)} entries: {'; '.join(faults)}. Train with its "
            f"settings, or from another source; here are {said or 'the same settings'}"
        )
    classes = _same_classes(source, settings, names)
    heads = [name for name in own if HEADS.match(name)]
    fit = all(own[name].shape == given[name].shape for name in heads) and source.names in (names, None)
    remade = [] if fit and _kind_of_heads(source.cfg.model) == _kind_of_heads(settings) else heads
    for name in remade:
        rows = _kept_rows(name, classes, source.cfg.model, settings)
        head = own[name].clone()
        head[list(rows)] = given[name][list(rows.values())].to(head)
        given[name] = head
    loaded = [name for name in given if name not in (*remade, *left_out)]
    model.load_state_dict({name: given.get(name, own[name]) for name in own})
    kept = classes if remade else dict.fromkeys(names)
    found = {
        "kept": [names[label] for label in kept],
        "new": [name for label, name in names.items() if label not in kept],
        "left_out": [name for label, name in (source.names or {}).items() if remade and label not in classes.values()],
    }
    return Start(source.label, loaded, remade, initialised, left_out, found, source.names is not None, differing)


def _differing(there: Model, here: Model) -> dict[str, list]:
    """Settings that differ, each with its values there and here."""
    before, after = (flat_settings(settings, "model.") for settings in (there, here))
    names = [name for name in before | after if name not in OF_NO_MATTER]
    return {name: [before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)}


def _comparable(state: Mapping[str, Tensor], without: list[str]) -> dict[str, Tensor]:
    """The entries that must fit; of class heads, a row."""
    kept = {name: value for name, value in state.items() if name not in without}
    return {name: value[0] if HEADS.match(name) else value for name, value in kept.items()}


def _same_classes(source: Source, settings: Model, names: Mapping[int, str]) -> dict[int, int]:
    """Label here -> label there of the classes that both know by the same name, if heads say them in the same way."""
    if _kind_of_heads(source.cfg.model)[0] != _kind_of_heads(settings)[0]:
        return {}
    theirs = source.names or {}
    found = {label: find_label(name, theirs) for label, name in names.items()}
    return {label: other for label, other in found.items() if other is not None}


def _kind_of_heads(settings: Model) -> tuple[str, bool]:
    """How they say classes, and whether that of proposals has a class that stands for all."""
    return getattr(settings, "classification", "sigmoid"), settings.proposal_head is not None


def _kept_rows(name: str, classes: dict[int, int], there: Model, here: Model) -> dict[int, int]:
    """Row here -> row there of what a class head keeps."""
    if _any_object(name, there) or _any_object(name, here):
        return {0: 0} if _any_object(name, there) and _any_object(name, here) else {}
    if {_kind_of_heads(settings)[0] for settings in (there, here)} == {"softmax"}:
        return classes | {-1: -1}  # no-object
    return classes


def _any_object(name: str, settings: Model) -> bool:
    """Whether an entry is of the head that judges proposals, by one class that stands for all."""
    return settings.proposal_head is not None and f"class_embed.{settings.proposal_head}." in name
