"""DETR's augmentation at any image size: what is drawn is a list of steps, which move pixels and boxes together.

The paper resizes the shorter side to 480..800 pixels. Every length of that recipe is given here as it stands in
the paper and multiplied by `image_size` / 800.

Where every image draws a size of its own, as in the paper, more than half of the pixels of a batch can be padding. With
`data.scales` "batch" the draws that decide about sizes (cropped or not, sides of the crop, scale) are made once for a
batch: each image meets the same sizes equally often, but beside images of like size. Flips and places of crops stay
each image's own.

Pixels stay 8 bit numbers, a colour's three side by side in memory: torch resizes those several times faster than
others, and a batch of them is a quarter as large. `normalised` makes of them what models see, on their device.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from detrlib.data.decoding import as_pixels
from detrlib.errors import ConfigError

PAPER_SIZE = 800  # shorter side in validation, pixels; the unit of the lengths below
LONGEST = 1333
TRAINING_SIZES = range(480, 801, 32)
SIZES_BEFORE_CROP = (400, 500, 600)
CROP_SIDES = (384, 600)

# Mean and standard deviation of ImageNet's pixels per channel (RGB in 0..1), which pretrained backbones expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]  # height, width


def normalised(pixels: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Images as models see them, made on the device of their pixels: the one place that normalises.

    Args:
        pixels: [B,3,H,W] uint8; floating point numbers are taken for normalised already.
        padding_mask: [B,H,W], True = padding; None: no image is padded.

    Returns:
        [B,3,H,W] float32 with mean 0 and deviation 1 over ImageNet's pixels, and exactly 0 where there is padding.
    """
    if pixels.is_floating_point():
        return pixels
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):  # numbers: a tensor would have to be copied
        images[:, channel].sub_(mean).div_(std)
    return images if padding_mask is None else images.masked_fill_(padding_mask[:, None], 0.0)


def resized(height: int, width: int, shorter: int, longest: int | None = None) -> tuple[int, int]:
    """(height, width) with the given shorter side and the aspect ratio kept, unless the longer would pass `longest`.

    Rounds as DETR does, to the pixel: torchvision's own rule differs by one pixel for some images.
    """
    short, long = min(height, width), max(height, width)
    if longest is not None and long / short * shorter > longest:
        shorter = round(longest * short / long)
        if shorter < 1:  # of a line of pixels no ratio can be kept
            return (1, longest) if height <= width else (longest, 1)
    if short == shorter:
        return height, width
    other = int(shorter * long / short)
    return (shorter, other) if height <= width else (other, shorter)


class Draws:
    """Where the random numbers of one image come from: its own, and those that decide about sizes.

    image: what the numbers follow from; None: from torch's generator.
    batch: what those of sizes follow from; None: they are the image's own too.
    """

    def __init__(self, image: str | None = None, batch: str | None = None):
        self.own = random.Random(int(torch.randint(2**62, ())) if image is None else image)
        self.sizes = self.own if batch is None else random.Random(batch)

    @staticmethod
    def between(source: random.Random, low: int, high: int) -> int:
        """From `low` to `high`, both included, by one number of `source` however wide that is: others stay the same."""
        return low + int(source.random() * (high - low + 1))


class Flip(NamedTuple):
    """Left and right change places."""

    def pixels(self, pixels: Tensor) -> Tensor:
        return pixels.flip(-1)

    def boxes(self, boxes: Tensor, size: Size) -> Tensor:
        x0, y0, x1, y1 = boxes.unbind(1)
        return torch.stack([size[1] - x1, y0, size[1] - x0, y1], 1)

    def size(self, size: Size) -> Size:
        return size


class Resize(NamedTuple):
    """To so many pixels, bilinear, each a mean of all that it covers where there were more."""

    height: int
    width: int

    def pixels(self, pixels: Tensor) -> Tensor:
        return functional.resize_image(pixels, [self.height, self.width], antialias=True)

    def boxes(self, boxes: Tensor, size: Size) -> Tensor:
        new, old = torch.tensor([self.width, self.height] * 2), torch.tensor([size[1], size[0]] * 2)
        return boxes * new / old  # in this order what ends at the edge of the image does so exactly

    def size(self, size: Size) -> Size:
        return self.height, self.width


class Crop(NamedTuple):
    """A part of the image; boxes are cut to it, and of those outside nothing is left."""

    top: int
    left: int
    height: int
    width: int

    def pixels(self, pixels: Tensor) -> Tensor:
        part = pixels[:, self.top : self.top + self.height, self.left : self.left + self.width]
        return part.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # in one piece: others are resized at half the speed

    def boxes(self, boxes: Tensor, size: Size) -> Tensor:
        inside = boxes - torch.tensor([self.left, self.top] * 2)
        return torch.minimum(inside.clamp_(min=0), torch.tensor([self.width, self.height] * 2))

    def size(self, size: Size) -> Size:
        return self.height, self.width


Step = Flip | Resize | Crop
Geometry = Callable[[Size, Draws], list[Step]]  # what is done to an image of that size


class RandomFlip:
    """Every second image."""

    def __call__(self, size: Size, draws: Draws) -> list[Step]:
        return [Flip()] if draws.own.random() < 0.5 else []


class ResizeShorter:
    """Resize to a shorter side drawn from `sizes`; an image that has it already is left as it is."""

    def __init__(self, sizes: list[int], longest: int | None = None):
        self.sizes, self.longest = sizes, longest

    def __call__(self, size: Size, draws: Draws) -> list[Step]:
        shorter = self.sizes[draws.between(draws.sizes, 0, len(self.sizes) - 1)]
        new = resized(*size, shorter, self.longest)
        return [] if new == size else [Resize(*new)]


class RandomSidesCrop:
    """Crop a random rectangle whose sides are drawn from `shortest`..`longest`, or less where the image is smaller."""

    def __init__(self, shortest: int, longest: int):
        self.shortest, self.longest = shortest, longest

    def __call__(self, size: Size, draws: Draws) -> list[Step]:
        height, width = (
            draws.between(draws.sizes, min(self.shortest, available), min(self.longest, available))
            for available in size
        )
        corner = (draws.between(draws.own, 0, free) for free in (size[0] - height, size[1] - width))
        return [Crop(*corner, height, width)]


class InTurn:
    """One transform after the other."""

    def __init__(self, *transforms: Geometry):
        self.transforms = transforms

    def __call__(self, size: Size, draws: Draws) -> list[Step]:
        steps = []
        for transform in self.transforms:
            for step in transform(size, draws):
                steps.append(step)
                size = step.size(size)
        return steps


class EitherOf:
    """One of several transforms, each as likely as the others."""

    def __init__(self, *transforms: Geometry):
        self.transforms = transforms

    def __call__(self, size: Size, draws: Draws) -> list[Step]:
        return self.transforms[draws.between(draws.sizes, 0, len(self.transforms) - 1)](size, draws)


class DetectionTransform:
    """What `geometry` draws, done to an image and its boxes.

    geometry: one of the above, or any other function.
    resizes: one of them is the first thing that changes the scale of an image; none: its pixels are looked at.
    share_sizes: images of a batch draw the same sizes.
    """

    def __init__(self, geometry: Geometry, resizes: Sequence[ResizeShorter] = (), share_sizes: bool = False):
        self.geometry, self.resizes, self.share_sizes = geometry, resizes, share_sizes

    def largest(self, height: int, width: int) -> Size:
        """The largest (height, width) at which an image of that size is looked at; never more than it has."""
        sizes = [resized(height, width, max(one.sizes), one.longest) for one in self.resizes]
        return min((height, width), max(sizes, default=(height, width)))

    def draw(self, size: Size, image: str | None = None, batch: str | None = None) -> list[Step]:
        """The steps for an image of that size; equal texts for an image, and for a batch, make equal draws."""
        return self.geometry(size, Draws(image, batch if self.share_sizes else None))

    def __call__(
        self, image: Image.Image | Tensor, boxes: Tensor, labels: Tensor, draws: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, boxes and labels after the steps that are drawn for an image.

        Args:
            image: PIL in RGB, or uint8 [3,H,W].
            boxes, labels: [n,4] xyxy in pixels, within the image, and [n].
            draws: texts that random numbers of the image and of its batch follow from, see `Draws`; None: chance,
                that is torch's generator.

        Returns:
            The same three; boxes are cut by crops, and those with nothing left are dropped.
        """
        pixels = image if isinstance(image, Tensor) else as_pixels(image)
        size = tuple(pixels.shape[-2:])
        steps = self.draw(size, *(draws or ()))
        for step in steps:
            pixels, boxes = step.pixels(pixels), step.boxes(boxes, size)
            size = step.size(size)
        if any(isinstance(step, Crop) for step in steps):
            visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, labels = boxes[visible], labels[visible]
        return pixels, boxes, labels


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
    if recipe == "flip":
        return DetectionTransform(InTurn(RandomFlip(), plain), [plain])
    any_size = ResizeShorter([scaled(size) for size in TRAINING_SIZES], scaled(LONGEST))
    first = ResizeShorter([scaled(size) for size in SIZES_BEFORE_CROP])
    zoom = InTurn(first, RandomSidesCrop(*(scaled(side) for side in CROP_SIDES)), any_size)
    return DetectionTransform(InTurn(RandomFlip(), EitherOf(any_size, zoom)), [any_size, first], scales == "batch")


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
