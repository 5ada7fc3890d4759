"""DETR's augmentation at any image size, from transforms that move images and boxes together.

The paper resizes the shorter side to 480..800 pixels. Every length of that recipe is given here as it stands in
the paper and multiplied by `image_size` / 800.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from detrlib.errors import ConfigError

PAPER_SIZE = 800  # shorter side in validation, pixels; the unit of the lengths below
LONGEST = 1333
TRAINING_SIZES = range(480, 801, 32)
SIZES_BEFORE_CROP = (400, 500, 600)
CROP_SIDES = (384, 600)

# Mean and standard deviation of ImageNet's pixels per channel (RGB in 0..1), which pretrained backbones expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def resized(height: int, width: int, shorter: int, longest: int | None = None) -> tuple[int, int]:
    """(height, width) with the given shorter side and the aspect ratio kept, unless the longer would pass `longest`.

    Rounds as DETR does, to the pixel: torchvision's own rule differs by one pixel for some images.
    """
    short, long = min(height, width), max(height, width)
    if longest is not None and long / short * shorter > longest:
        shorter = round(longest * short / long)
    shorter = max(shorter, 1)
    if short == shorter:
        return height, width
    other = int(shorter * long / short)
    return (shorter, other) if height <= width else (other, shorter)


class ResizeShorter(v2.Transform):
    """Resize to a shorter side drawn from `sizes`; an image that has it already is left as it is."""

    def __init__(self, sizes: list[int], longest: int | None = None):
        super().__init__()
        self.sizes, self.longest = sizes, longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        shorter = self.sizes[int(torch.randint(len(self.sizes), ()))]
        size = resized(height, width, shorter, self.longest)
        return {"size": None if size == (height, width) else list(size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if params["size"] is None:
            return inpt
        return self._call_kernel(functional.resize, inpt, params["size"], antialias=True)


class RandomSidesCrop(v2.Transform):
    """Crop a random rectangle whose sides are drawn from `shortest`..`longest`, or less where the image is smaller."""

    def __init__(self, shortest: int, longest: int):
        super().__init__()
        self.shortest, self.longest = shortest, longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        crop_height, crop_width = self._side(height), self._side(width)
        top, left = _between(0, height - crop_height), _between(0, width - crop_width)
        return {"top": top, "left": left, "height": crop_height, "width": crop_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(functional.crop, inpt, **params)

    def _side(self, available: int) -> int:
        return _between(min(self.shortest, available), min(self.longest, available))


class DetectionTransform:
    """Apply `geometry` to an image and its boxes together, then normalise the image for the backbone.

    resizes: one of them is the first thing that changes the scale of an image; none: its pixels are looked at.
    """

    def __init__(self, geometry: v2.Transform, resizes: Sequence[ResizeShorter] = ()):
        self.geometry, self.resizes = geometry, resizes

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """The largest (height, width) at which an image of that size is looked at; never more than it has."""
        sizes = [resized(height, width, max(one.sizes), one.longest) for one in self.resizes]
        return min((height, width), max(sizes, default=(height, width)))

    def __call__(self, image: Image.Image | Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image PIL or [3, H, W]; boxes [n, 4] xyxy pixels; labels [n] -> the same, boxes in pixels of the new image.

        Boxes are clipped to the image; those with nothing left, and their labels, are dropped.
        """
        image = tv_tensors.Image(image)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
        image, boxes = self.geometry(image, boxes)
        boxes = functional.clamp_bounding_boxes(boxes).as_subclass(Tensor)
        visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        pixels = functional.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)
        return functional.normalize(pixels, MEAN, STD), boxes[visible], labels[visible]


def build_augmentation(
    image_size: int, recipe: Literal["detr", "flip", "none"] = "detr", train: bool = False
) -> DetectionTransform:
    """What images and boxes of a split pass: the training recipe, or the plain resize of validation.

    image_size  shorter side in validation, pixels
    recipe      "detr": flip, random scale, random crop; "flip": flip only; "none": as in validation
    Raises ConfigError for an unknown recipe.
    """
    if recipe not in ("detr", "flip", "none"):
        raise ConfigError(f"data.augment: unknown recipe {recipe!r}; choose 'detr', 'flip' or 'none'")

    def scaled(length: int) -> int:
        return max(round(length * image_size / PAPER_SIZE), 1)

    plain = ResizeShorter([image_size], scaled(LONGEST))
    if not train or recipe == "none":
        return DetectionTransform(plain, [plain])
    flip = v2.RandomHorizontalFlip()
    if recipe == "flip":
        return DetectionTransform(v2.Compose([flip, plain]), [plain])
    any_size = ResizeShorter([scaled(size) for size in TRAINING_SIZES], scaled(LONGEST))
    zoom = [
        ResizeShorter([scaled(size) for size in SIZES_BEFORE_CROP]),
        RandomSidesCrop(*(scaled(side) for side in CROP_SIDES)),
        any_size,
    ]
    return DetectionTransform(v2.Compose([flip, v2.RandomChoice([any_size, v2.Compose(zoom)])]), [any_size, zoom[0]])


def denormalise(images: Tensor) -> Tensor:
    """Normalised images [..., 3, H, W] -> pixels in 0..1, for looking at them."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))
