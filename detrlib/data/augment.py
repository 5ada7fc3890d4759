"""DETR's augmentation at any image size, from transforms that move images and boxes together.

The paper resizes the shorter side to 480..800 pixels. Every length of that recipe is given here as it stands in
the paper and multiplied by `image_size` / 800.

Where every image draws a size of its own, as in the paper, more than half of the pixels of a batch can be padding. With
`data.scales` "batch" the draws that decide about sizes (cropped or not, sides of the crop, scale) are made once for a
batch: each image meets the same sizes equally often, but beside images of like size. Flips and places of crops stay
each image's own. Every process draws for its own part of a batch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


class SizeDraws:
    """Where the draws that decide about sizes come from: torch's generator, or one that is the same for all images."""

    generator: torch.Generator | None = None

    def between(self, low: int, high: int) -> int:
        """A number from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within it every image meets the same draws, see `begin`; what they are follows from torch's generator."""
        self.seed, self.generator = int(torch.randint(2**31, ())), torch.Generator()
        try:
            yield
        finally:
            self.generator = None

    def begin(self) -> None:
        """An image begins."""
        if self.generator is not None:
            self.generator.manual_seed(self.seed)


class ResizeShorter(v2.Transform):
    """Resize to a shorter side drawn from `sizes`; an image that has it already is left as it is."""

    def __init__(self, sizes: list[int], longest: int | None = None, draws: SizeDraws | None = None):
        super().__init__()
        self.sizes, self.longest, self.draws = sizes, longest, draws or SizeDraws()

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        shorter = self.sizes[self.draws.between(0, len(self.sizes) - 1)]
        size = resized(height, width, shorter, self.longest)
        return {"size": None if size == (height, width) else list(size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if params["size"] is None:
            return inpt
        return self._call_kernel(functional.resize, inpt, params["size"], antialias=True)


class RandomSidesCrop(v2.Transform):
    """Crop a random rectangle whose sides are drawn from `shortest`..`longest`, or less where the image is smaller."""

    def __init__(self, shortest: int, longest: int, draws: SizeDraws | None = None):
        super().__init__()
        self.shortest, self.longest, self.draws = shortest, longest, draws or SizeDraws()

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        crop_height, crop_width = self._side(height), self._side(width)
        own = SizeDraws()
        top, left = own.between(0, height - crop_height), own.between(0, width - crop_width)
        return {"top": top, "left": left, "height": crop_height, "width": crop_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(functional.crop, inpt, **params)

    def _side(self, available: int) -> int:
        return self.draws.between(min(self.shortest, available), min(self.longest, available))


class EitherOf(v2.Transform):
    """One of several transforms, each as likely as the others."""

    def __init__(self, transforms: list[v2.Transform], draws: SizeDraws):
        super().__init__()
        self.transforms, self.draws = transforms, draws

    def forward(self, *inputs: Any) -> Any:
        each = torch.full([len(self.transforms)], 1 / len(self.transforms))
        return self.transforms[int(torch.multinomial(each, 1, generator=self.draws.generator))](*inputs)


class DetectionTransform:
    """Apply `geometry` to an image and its boxes together, then normalise the image for the backbone.

    resizes: one of them is the first thing that changes the scale of an image; none: its pixels are looked at.
    draws: of sizes within `geometry`, where images of a batch share them.
    """

    def __init__(self, geometry: v2.Transform, resizes: Sequence[ResizeShorter] = (), draws: SizeDraws | None = None):
        self.geometry, self.resizes, self.draws = geometry, resizes, draws

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """The largest (height, width) at which an image of that size is looked at; never more than it has."""
        sizes = [resized(height, width, max(one.sizes), one.longest) for one in self.resizes]
        return min((height, width), max(sizes, default=(height, width)))

    def batch(self) -> AbstractContextManager:
        """Within it images are those of one batch."""
        return nullcontext() if self.draws is None else self.draws.shared()

    def __call__(self, image: Image.Image | Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image PIL or [3, H, W]; boxes [n, 4] xyxy pixels; labels [n] -> the same, boxes in pixels of the new image.

        Boxes are clipped to the image; those with nothing left, and their labels, are dropped.
        """
        if self.draws is not None:
            self.draws.begin()
        image = tv_tensors.Image(image)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
        image, boxes = self.geometry(image, boxes)
        boxes = functional.clamp_bounding_boxes(boxes).as_subclass(Tensor)
        visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        pixels = functional.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)
        return functional.normalize(pixels, MEAN, STD), boxes[visible], labels[visible]


def build_augmentation(
    image_size: int,
    recipe: Literal["detr", "flip", "none"] = "detr",
    train: bool = False,
    scales: Literal["image", "batch"] = "image",
) -> DetectionTransform:
    """What images and boxes of a split pass: the training recipe, or the plain resize of validation.

    image_size  shorter side in validation, pixels
    recipe      "detr": flip, random scale, random crop; "flip": flip only; "none": as in validation
    scales      whether every image draws its sizes, or a batch does for all of its images
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
    draws = SizeDraws()
    any_size = ResizeShorter([scaled(size) for size in TRAINING_SIZES], scaled(LONGEST), draws)
    zoom = [
        ResizeShorter([scaled(size) for size in SIZES_BEFORE_CROP], draws=draws),
        RandomSidesCrop(*(scaled(side) for side in CROP_SIDES), draws),
        any_size,
    ]
    geometry = v2.Compose([flip, EitherOf([any_size, v2.Compose(zoom)], draws)])
    return DetectionTransform(geometry, [any_size, zoom[0]], draws if scales == "batch" else None)


def largest_canvas(
    sizes: Iterable[tuple[int, int]], image_size: int, recipe: Literal["detr", "flip", "none"], images: int
) -> tuple[int, int]:
    """(height, width) of the largest batch of `images` that training can make of pictures of `sizes` (width, height).

    An upright picture beside a wide one makes a batch higher than the one and wider than the other.
    """
    longest = max(round(LONGEST * image_size / PAPER_SIZE), 1)
    drawn = {resized(height, width, image_size, longest) for width, height in set(sizes)}
    if recipe == "detr":  # crops, of which either side may be the longer
        side = min(round(image_size * max(CROP_SIDES) / min(CROP_SIDES)), longest)
        drawn |= {(image_size, side), (side, image_size)}
    if images == 1:
        return max(drawn, key=math.prod)
    return tuple(map(max, zip(*drawn, strict=True)))


def denormalise(images: Tensor) -> Tensor:
    """Normalised images [..., 3, H, W] -> pixels in 0..1, for looking at them."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)
