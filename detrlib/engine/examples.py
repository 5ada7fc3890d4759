"""Any image with its detections and maps: of a run's validation data what is stored is read, the rest is computed.

An evaluation stores the first images of the split; which of all went badly is known only after it. Pictures of one's
own have no objects to compare with.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from detrlib.config import load_config
from detrlib.data import CocoDataset, build_dataset, collate
from detrlib.engine.evaluate import load_model
from detrlib.engine.predict import predict
from detrlib.errors import DataError, RunError
from detrlib.losses import Criterion, match
from detrlib.metrics.detection import errors_by_image
from detrlib.models.outputs import Site
from detrlib.runs.examples import EXAMPLE_SCORE, Example, load_examples, make_example, with_maps
from detrlib.runs.folder import has_table, load_results
from detrlib.runs.results import load_matches
from detrlib.runs.sinks import sink_threshold

KEPT = 16  # images that were computed and stay in memory


class ValidationImages(Mapping[int, Example]):
    """The validation images of a run by id, those that went worst first.

    An image that the evaluation has stored is read. Of any other picture, detections and maps are computed when it is
    asked for, which takes about a second on a CPU and needs the data of the run.

    Args:
        run_dir: folder of an evaluated run, or of results inside it, such as those on another split.
        sites: whose maps are wanted; None: those that the evaluation stores (evaluate.store_sites).

    Raises:
        RunError: the run was not evaluated, or what it stores is damaged.
    """

    annotated = True  # objects are known

    def __init__(self, run_dir: Path, sites: Sequence[Site] | None = None):
        self.run_dir, self.cfg = run_dir, load_config(run_dir / "config.yaml")
        self.sites = tuple(sites or self.cfg.evaluate.store_sites)
        self.results = load_results(run_dir)
        self.sink_threshold = sink_threshold(self.results)
        there = any((run_dir / "examples").glob("*.npz"))
        self.stored = {example.image_id: example for example in (load_examples(run_dir) if there else [])}
        self.errors = self._errors()
        self._computed: dict[int, Example] = {}

    def _errors(self) -> pd.DataFrame:
        """How badly each image went, see `errors_by_image`; only stored ones where matches are not."""
        if "attention" in self.results and has_table(self.run_dir, "matches"):
            return errors_by_image(load_matches(self.run_dir), EXAMPLE_SCORE)
        objects = {image_id: len(example.true_boxes) for image_id, example in self.stored.items()}
        return pd.Series(objects, name="objects", dtype=int).rename_axis("image_id").to_frame()

    @property
    def at_once(self) -> set[int]:
        """Ids of the images that need not be computed."""
        return {image_id for image_id, example in self.stored.items() if set(self.sites) <= set(example.sites)}

    def __iter__(self) -> Iterator[int]:
        return iter(self.errors.index.tolist())

    def __len__(self) -> int:
        return len(self.errors)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.errors.index

    def __getitem__(self, image_id: int) -> Example:
        if image_id not in self:
            raise KeyError(image_id)
        stored = self.stored.get(image_id)
        if stored is not None and set(self.sites) <= set(stored.sites):
            return stored
        if image_id not in self._computed:
            self._computed[image_id] = self._compute(image_id)
            for earliest in list(self._computed)[:-KEPT]:
                del self._computed[earliest]
        return self._computed[image_id]

    @cached_property
    def _model_and_data(self) -> tuple[nn.Module, CocoDataset]:
        # Results inside a run are made of its checkpoint.
        inside = (folder for folder in (self.run_dir, *self.run_dir.parents[:2]) if (folder / "checkpoints").is_dir())
        model = load_model(next(inside, self.run_dir), self.results.get("checkpoint", "last"))
        return model, build_dataset(self.cfg.data, "val")

    @torch.no_grad()
    def _compute(self, image_id: int) -> Example:
        model, dataset = self._model_and_data
        if image_id not in dataset.image_ids:
            lacking = f"{dataset.annotations_path} has no image {image_id}"
            raise DataError(f"{lacking}, which {self.run_dir} was evaluated on; evaluate the run again")
        batch = collate([dataset[dataset.image_ids.index(image_id)]])
        predictions = model(batch.images, batch.padding_mask, need_attention={*self.sites, "decoder_cross"})
        indices = match(predictions, batch.targets, Criterion(**dict(self.cfg.loss)).costs)
        return with_maps(make_example(batch, predictions, indices, 0), predictions, self.sites)


class OwnPictures(Mapping[int, Example]):
    """Pictures of one's own by number, in the order given: what a model detects in them is computed at once.

    They are examples without annotated objects, for all figures of examples. Arguments and faults are those of
    `predict`; sites: whose maps are wanted, None: decoder_cross.
    """

    annotated = False

    def __init__(self, model: str | Path, pictures: Any, sites: Sequence[Site] | None = None):
        self.detected = predict(model, pictures, min_score=EXAMPLE_SCORE, attention=sites or True)
        self.stored = {one.image_id: one.example for one in self.detected}
        self.at_once = set(self.stored)
        evaluated = isinstance(model, Path) and (model / "results.json").exists()
        self.sink_threshold = sink_threshold(load_results(model) if evaluated else {})
        rows = [(one.image_id, 0, len(one), one.picture) for one in self.detected]
        self.errors = pd.DataFrame(rows, columns=["image_id", "objects", "detections", "picture"]).set_index("image_id")

    def __iter__(self) -> Iterator[int]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, image_id: int) -> Example:
        return self.stored[image_id]

    def title(self, image_id: int) -> str:
        """The name of its file."""
        return Path(self.errors.loc[image_id, "picture"]).name


def open_images(
    run_dir: Path, sites: Sequence[Site] | None = None, pictures: Any = ()
) -> ValidationImages | OwnPictures:
    """The validation images of a run, or, where `pictures` are given, those of one's own; see the two classes."""
    own = isinstance(pictures, str | Path) or len(pictures) > 0
    return OwnPictures(run_dir, pictures, sites) if own else ValidationImages(run_dir, sites)


def one_image(images: Mapping[str, ValidationImages | OwnPictures], image_id: int | None = None) -> dict[str, Example]:
    """Take one image in every run.

    Args:
        images: by the name of the run; those without attention are left out.
        image_id: of the image; None: of those that the first run stores, the one with most objects.

    Returns:
        The image in each run; nothing where no run is given.

    Raises:
        RunError: no run has attention, or one was not evaluated on that image; names the runs.
    """
    attending = {run: own for run, own in images.items() if own}
    if not images:
        return {}
    if not attending:
        raise RunError(f"no attention to show in {', '.join(images)}; name a run whose model has attention")
    first = next(iter(attending.values()))
    if image_id is None:
        image_id = int(first.errors["objects"].reindex(list(first.stored) or list(first)).idxmax())
    missing = [run for run, own in attending.items() if image_id not in own]
    if missing:
        raise RunError(f"{', '.join(missing)}: not evaluated on image {image_id}; evaluate all runs on the same images")
    return {run: own[image_id] for run, own in attending.items()}
