"""Any folder that `formats` knows as a data set of images and boxes, checked before the first training step."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from detrlib.boxes import xyxy_to_cxcywh
from detrlib.config.model import MOST_CLASSES
from detrlib.data.annotations import Annotations
from detrlib.data.augment import Resize
from detrlib.data.batch import Drawn
from detrlib.data.classes import labels_in
from detrlib.data.columns import ImageColumns, Names
from detrlib.data.decoding import UNREADABLE, as_pixels, read_picture, why_unreadable
from detrlib.data.index import read_columns
from detrlib.data.objects import AT_ONCE, Objects, clean, clipped
from detrlib.data.pictures import find_files, sizes_in_files
from detrlib.errors import DataError, listed


class CocoDataset(Dataset):
    """Images of one split with their boxes, in order of image id.

    `dataset[i]` is `(pixels, target)`: pixels uint8 [3, H, W] and
        boxes          [n, 4] cxcywh in 0..1 of the transformed image, before any padding
        labels         [n] int64, indices into `names`
        image_id       int
        original_size  [2] (height, width) of the file, pixels
        size           [2] (height, width) after the transform, pixels

    Crowd regions are no targets, as in DETR, but stay in `ground_truth`. Both are made of one cleaned list, see
    `detrlib.data.objects.clean`: boxes are clipped to the image; those without an area are left out and counted in
    `dropped`. Images without objects are kept. What was done to the file's content stands in `notes`, a sentence each.

    images       folder of the image files
    annotations  JSON file with `images`, `annotations` and `categories`, or what `formats` reads as one
    transform    callable(pixels uint8 [3, H, W], boxes [n, 4] xyxy pixels, labels [n], draws) -> the first three; see
                 `DetectionTransform`, whose draws are None for `dataset[i]`
    classes      label -> name, of the training split: those of this one are matched by name; None: its own
    contiguous   its own classes have labels 0..n-1 in order of category id; otherwise the category ids themselves
    strict       refuse boxes without an area
    clip         boxes that reach beyond the image are cut in `ground_truth` too; False: as official code judges them
    upright      pictures are turned as their orientation in EXIF says, and annotated so
    truncated    JPEG files that are cut short are read, grey where nothing is left
    limit        keep the first `limit` images
    cache        keep decoded images in memory after first use, once per worker process: at the largest size that
                 `transform` may ask for. Without random scales, images are those that it makes of the file; where it
                 draws a smaller scale, they have been resampled twice.
    keep         choose images: from their file names, those that are kept; `limit` counts these
    train        refuse a set without a single box: it could only teach that there is nothing to see

    Raises `DataError` for every fault that can be seen without decoding the images, and for an unreadable
    image when it is used.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        transform: Callable | None = None,
        *,
        classes: Mapping[int, str] | None = None,
        contiguous: bool = False,
        strict: bool = False,
        clip: bool = True,
        upright: bool = False,
        truncated: bool = False,
        limit: int | None = None,
        cache: bool = False,
        keep: Callable[[list[str]], set[str]] = set,
        train: bool = False,
    ):
        self.images_path, self.annotations_path = Path(images), Path(annotations)
        self.transform, self._cache = transform, {} if cache else None
        self.upright, self.truncated, self.clip = upright, truncated, clip
        self.notes: list[str] = []

        self._columns = read_columns(self.annotations_path)
        images, names = self._columns.images, self._columns.images.names.tolist()
        kept = keep(names)
        rows = torch.tensor([row for row, name in enumerate(names) if name in kept], dtype=torch.int64)
        self._rows = rows[images.ids[rows].argsort()][:limit]
        self._ids, self._sizes = images.ids[self._rows], images.sizes[self._rows]
        self._find_files([names[row] for row in self._rows.tolist()])
        objects = self._objects()
        self._label_of = self._labels_of_categories(objects, classes, contiguous)
        self.dropped = len(objects.without_area)
        self._note_changes(objects, strict)
        self._collect_boxes(objects)
        if train and not len(self._labels):
            raise DataError(f"{annotations}: no usable box in {len(self)} images: nothing to learn from")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int | Drawn) -> tuple[Tensor, dict]:
        index, *draws = index if isinstance(index, Drawn) else (index,)
        pixels, original_size = self._pixels(index)
        boxes, labels = self.objects(index)
        if pixels.shape[-2:] != original_size:  # reduced in the cache
            boxes = Resize(*pixels.shape[-2:]).boxes(boxes, original_size)
        if self.transform is not None:
            pixels, boxes, labels = self.transform(pixels, boxes, labels, draws or None)
        height, width = pixels.shape[-2:]
        target = {
            "boxes": xyxy_to_cxcywh(boxes) / torch.tensor([width, height, width, height]),
            "labels": labels,
            "image_id": int(self._ids[index]),
            "original_size": torch.tensor(original_size),
            "size": torch.tensor([height, width]),
        }
        return pixels, target

    def image(self, index: int) -> Image.Image:
        """The picture in RGB, as annotated: stored, or upright. Raises `DataError` when it is unreadable or not of the
        annotated size."""
        path = self.images_path / self._names[index]
        try:
            image, (height, width) = read_picture(path, self.upright, truncated=self.truncated)
        except UNREADABLE as error:
            raise DataError(
                f"{path}: {why_unreadable(error)}; {self._mention(index)}; replace it or remove its entry"
            ) from error
        if fault := self.size_fault(index, width, height):
            raise DataError(f"{path}: {fault}")
        return image

    @property
    def files(self) -> list[Path]:
        """The picture of each image."""
        return [self.images_path / name for name in self.file_names]

    def size_fault(self, index: int, width: int, height: int) -> str | None:
        """In words, why a picture of that size is not the one that was annotated; None: it may be."""
        annotated = tuple(self._sizes[index].tolist())
        if (width, height) == annotated:
            return None
        other = ("as stored", "stored") if self.upright else ("after rotation by EXIF", "exif")
        return (
            f"the file is {width} x {height} pixels, {self.annotations_path} says {annotated[0]} x {annotated[1]}; "
            "boxes would be misplaced (was it resized? or annotated {}: then set data.orientation: {})".format(*other)
        )

    def objects(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes [n, 4] xyxy in pixels of the file and labels [n] of one image, crowds left out."""
        first, last = self._first[index : index + 2].tolist()
        return self._boxes[first:last].clone(), self._labels[first:last].clone()

    def object_sides(self) -> Tensor:
        """The longer side of every object [n] in parts of its image's shorter one: times `image_size`, in pixels."""
        sides = (self._boxes[:, 2:] - self._boxes[:, :2]).amax(1)
        return sides / self._sizes.amin(1).repeat_interleave(self.objects_per_image())

    @property
    def image_ids(self) -> list[int]:
        """Of the images, rising."""
        return self._ids.tolist()

    @property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """Image id -> (width, height) of its file in pixels, in the order of the images."""
        return dict(zip(self.image_ids, map(tuple, self._sizes.tolist()), strict=True))

    @property
    def labels(self) -> Tensor:
        """Of all objects that are taught, [n] int64."""
        return self._labels

    def objects_per_image(self) -> Tensor:
        """How many are taught in each image, [N] int64."""
        return self._first.diff()

    @property
    def file_names(self) -> list[str]:
        """Of the images, as the annotations have them."""
        return self._names.tolist()

    def description(self) -> dict[str, Any]:
        """What is in this data set, wherever it lies: images, objects, classes, and a digest of all that is taught."""
        columns = zip(self.image_ids, self.file_names, self._sizes.tolist(), strict=True)
        records = [[id, name, width, height] for id, name, (width, height) in columns]
        digest = hashlib.sha256(json.dumps(records).encode())
        for tensor in (self._boxes, self._labels, self._first):
            digest.update(tensor.numpy().tobytes())
        classes = {str(label): name for label, name in self.names.items()}
        counts = {"images": len(self), "objects": len(self._labels)}
        return counts | {"classes": classes, "digest": digest.hexdigest()[:16]}

    def frame(self) -> pd.DataFrame:
        """One row per annotated object, crowds included: image_id, label, category, width, height, area, crowd.

        Sizes are in pixels; area is that of the object's mask where the file has it, of its box elsewhere.
        """
        objects = self._objects().among(self._columns.boxes)
        labels = self._labels_of(objects.category_ids)
        width, height = objects.boxes[:, 2:].T.numpy()
        columns = {"image_id": objects.image_ids.numpy(), "label": labels.numpy()}
        columns |= {"category": [self.names[label] for label in labels.tolist()], "width": width, "height": height}
        return pd.DataFrame(columns | {"area": objects.areas.numpy(), "crowd": objects.crowd.numpy()})

    @property
    def ground_truth(self) -> Annotations:
        """The annotation file, restricted to the images of this dataset and cleaned as what is taught.

        Made anew when asked for, so that nobody holds it in memory in between.
        """
        images = self._columns.images
        rows = self._rows.sort().values  # in the order of the file
        names = images.names.tolist()
        own = Names.of(names[row] for row in rows.tolist())
        records = ImageColumns(images.ids[rows], own, images.sizes[rows]).records()
        annotations = self._objects().among(self._columns.boxes).annotations()
        return {"images": records, "annotations": annotations} | self._columns.rest

    def _objects(self) -> Objects:
        return clean(self._columns.boxes, self._ids, self._sizes, self.clip)

    def _pixels(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """uint8 [3, h, w], reduced where it is cached, and the height and width of the picture."""
        if self._cache is not None and index in self._cache:
            pixels, size = self._cache[index]
            return pixels.clone(), size  # its receiver may change it
        pixels = as_pixels(self.image(index))
        size = tuple(pixels.shape[-2:])
        if self._cache is not None:
            largest = getattr(self.transform, "largest", lambda height, width: (height, width))(*size)
            if largest != size:
                pixels = Resize(*largest).pixels(pixels)
            self._cache[index] = pixels.clone(), size
        return pixels, size

    def _find_files(self, names: list[str]) -> None:
        """Every file must exist and every size be known."""
        if not self.images_path.is_dir():
            raise DataError(f"{self.images_path}: no such folder of images; {self.annotations_path} refers to it")
        names, moved, missing = find_files(self.images_path, names)
        if moved:
            self.notes.append(f"{moved} pictures are found without the folders that their file_name begins with")
        self._names = Names.of(names)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"{self.annotations_path}: image file {self.images_path / names[missing[0]]}{more} is missing; "
                f"{self._mention(missing[0])}; add the file or remove the entry"
            )
        without = (self._sizes == 0).any(1).nonzero()[:, 0].tolist()
        if without:
            sizes = sizes_in_files([self.images_path / names[index] for index in without], self.upright)
            self._sizes[without] = torch.tensor(sizes)

    def _labels_of_categories(
        self, objects: Objects, classes: Mapping[int, str] | None, contiguous: bool
    ) -> dict[int, int]:
        """{category id: label}; sets `names` {label: name}, `category_ids` {label: category id} and `num_classes`."""
        rest = self._columns.rest
        categories = sorted(rest["categories"], key=lambda category: category["id"])
        own = {category["id"]: label if contiguous else category["id"] for label, category in enumerate(categories)}
        named = {category["id"]: category["name"] for category in categories}
        labels = own
        if len(set(named.values())) < len(named):  # supercategories without objects may be called as their only class
            self._refuse_twins(named, self._columns.boxes.category_ids[objects.rows].unique().tolist())
        if classes is not None:
            annotated = Counter(self._columns.boxes.category_ids[objects.rows].tolist())
            labels = labels_in(rest, classes, annotated, self.annotations_path)
            if other := [f"{named[id]} (id {id}) is label {label}" for id, label in labels.items() if own[id] != label]:
                self.notes.append(f"classes are matched with those of training by name: {listed(other, 6)}")
        elif max(own.values()) >= MOST_CLASSES:
            raise DataError(
                f"{self.annotations_path}: categories: the largest id is {max(own)}, which would be a head of as many "
                "classes; set data.contiguous: true"
            )
        self.names = dict(classes or {label: named[id] for id, label in own.items()})
        self.category_ids = {label: id for id, label in labels.items()}
        self.num_classes = max(self.names) + 1
        return labels

    def _refuse_twins(self, named: Mapping[int, str], annotated: list[int]) -> None:
        """Raise DataError where two classes with objects have one name: numbers by name would be of one of them."""
        for name, count in Counter(named[id] for id in annotated).items():
            if count > 1:
                ids = listed(id for id in annotated if named[id] == name)
                raise DataError(
                    f"{self.annotations_path}: categories {ids} are all called {name!r} and have objects; "
                    "make them one, or give them names of their own"
                )

    def _note_changes(self, objects: Objects, strict: bool) -> None:
        if objects.without_area:
            message = f"{self.dropped} boxes have no area inside their image"
            if strict:
                remedy = f"annotation ids {listed(objects.without_area)}; correct them or set data.strict: false"
                raise DataError(f"{self.annotations_path}: {message}, {remedy}")
            self.notes.append(f"{message} and are left out")
        if objects.empty:
            self.notes.append(f"{objects.empty} annotations without a box (bbox: []) are left out")
        if objects.beyond:
            said = "for training and for evaluation" if self.clip else "for training, but are judged as they stand"
            self.notes.append(
                f"{len(objects.beyond)} boxes reach beyond their image, by up to {max(objects.beyond.values()):.0f} "
                f"pixels, and are cut to it {said} (data.clip)"
            )

    def _collect_boxes(self, objects: Objects) -> None:
        """Keep the boxes that are taught, of all images, in two flat tensors, which workers share."""
        taught = (~self._columns.boxes.crowd[objects.rows]).nonzero()[:, 0]
        taught = taught[objects.images[taught].argsort(stable=True)]
        images = objects.images[taught]
        self._boxes = torch.empty(len(taught), 4)
        for start in range(0, len(taught), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            corners = clipped(objects.boxes[taught[part]], self._sizes[images[part]])
            self._boxes[part] = torch.cat(corners, 1)
        self._labels = self._labels_of(self._columns.boxes.category_ids[objects.rows[taught]])
        self._first = torch.cat([images.new_zeros(1), torch.bincount(images, minlength=len(self)).cumsum(0)])

    def _labels_of(self, category_ids: Tensor) -> Tensor:
        categories, labels = torch.tensor(sorted(self._label_of.items())).T.contiguous()
        return labels[torch.searchsorted(categories, category_ids)]

    def _mention(self, index: int) -> str:
        """An image with its annotations, for a message."""
        id, boxes = int(self._ids[index]), self._columns.boxes
        own = listed(boxes.ids[boxes.image_ids == id].tolist())
        return f"image id {id}, " + (f"annotation ids {own}" if own else "which has no annotations")
