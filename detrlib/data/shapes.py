"""The embedded data set: drawn shapes on textured backgrounds, written once as an ordinary COCO-format folder.

Six classes, 1 to 5 objects an image, partly covering each other. Every image has its own random generator, made
from the seed, the split and the number of the image, so the pixels do not depend on how many processes draw.
"""

import colorsys
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from detrlib.config import Shapes
from detrlib.config.machine import cache_folder, cores
from detrlib.errors import DataError, RunError
from detrlib.files import one_at_a_time

logger = logging.getLogger(__name__)

DRAWING = 1  # version of the pictures, part of the folder's name: raise it with every change that moves a pixel
CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
SPLITS = ("train2017", "val2017")

MOST_OBJECTS = 5
EXTENT = (14 / 128, 68 / 128)  # smallest and largest object, as a share of the image's side
LEAST_VISIBLE = 0.6  # of an object's area, after others were drawn over it and the image's edge cut it
OVERSAMPLING = 4  # pixels are averaged over 4 x 4 samples, which smooths the edges
ATTEMPTS = 20  # positions tried for an object before the image goes without it
SERIAL = 256  # below this many images a pool of processes costs more than it saves


class Shape(NamedTuple):
    """Polygons in units of the object's extent, centred at 0: what to fill and, for a ring, what to cut out."""

    outline: np.ndarray  # [n, 2] x, y
    hole: np.ndarray | None = None


class Object(NamedTuple):
    """A drawn object: class, xyxy box and the area of its mask, both within the image but as if nothing covered it."""

    category_id: int
    box: tuple[float, float, float, float]
    area: float


def shapes_folder(settings: Shapes, cache: Path | None = None) -> Path:
    """The COCO-format folder of `settings`, drawn on first use and found in the cache (or `cache`) later.

    Boxes are amodal: they enclose the whole object, also where others cover it, and end at the image's edge.
    The folder appears complete or not at all, so several processes may ask for it at once.
    """
    cache = cache or cache_folder()
    name = f"shapes-v{DRAWING}-{settings.size}px-{settings.train}+{settings.val}-seed{settings.seed}"
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        with one_at_a_time(folder):
            if not folder.is_dir():  # otherwise another process has drawn it meanwhile
                _draw(folder, settings)
    except (OSError, RunError) as error:
        raise DataError(
            f"{cache}: the embedded shapes cannot be kept there ({error}); set DETRLIB_CACHE to another folder"
        ) from None
    return folder


def _draw(folder: Path, settings: Shapes) -> None:
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        draft.chmod(0o755)  # mkdtemp locks others out of what may be a shared cache
        logger.info("drawing %d images into %s, once", settings.train + settings.val, folder)
        for split, count in zip(SPLITS, (settings.train, settings.val), strict=True):
            _write_split(draft, split, count, settings)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_split(root: Path, split: str, count: int, settings: Shapes) -> None:
    images = root / split
    images.mkdir()
    draw = partial(_write_image, images, settings, SPLITS.index(split))
    objects_of = list(tqdm(_each(draw, count), total=count, desc=split, disable=None, leave=False))
    annotations = root / "annotations" / f"instances_{split}.json"
    annotations.parent.mkdir(exist_ok=True)
    annotations.write_text(json.dumps(_coco_format(objects_of, settings.size)))


def _each(draw: partial, count: int) -> Iterable[list[Object]]:
    """`draw(0)` .. `draw(count - 1)` in order, on all processors where there is enough to do."""
    processes = cores()
    if count < SERIAL or processes == 1:
        yield from map(draw, range(count))
    else:
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(draw, range(count), chunksize=32)


def _write_image(images: Path, settings: Shapes, split: int, index: int) -> list[Object]:
    pixels, objects = draw_image(settings.size, np.random.default_rng([settings.seed, split, index]))
    Image.fromarray(pixels).save(images / _file_name(index), compress_level=1)
    return objects


def _file_name(index: int) -> str:
    return f"{index + 1:012d}.png"


def _coco_format(objects_of: list[list[Object]], size: int) -> dict:
    images, annotations = [], []
    for index, objects in enumerate(objects_of):
        images.append({"id": index + 1, "file_name": _file_name(index), "width": size, "height": size})
        for category_id, (x0, y0, x1, y1), area in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": category_id,
                    "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
                    "area": round(area, 2),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": id, "name": name, "supercategory": "shape"} for id, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw_image(size: int, random: np.random.Generator) -> tuple[np.ndarray, list[Object]]:
    """One image uint8 [size, size, 3] and its objects, in the order they were drawn (later ones cover earlier)."""
    canvas = _background(size, random)
    owner = np.full((size, size), -1)  # which object each pixel shows
    objects: list[Object] = []
    needed: list[float] = []  # pixels of each object that must stay visible
    for _ in range(random.integers(1, MOST_OBJECTS + 1)):
        for _ in range(ATTEMPTS):
            category = int(random.integers(len(CLASSES)))
            shape, extent = _placed(CLASSES[category], size, random)
            x0, y0, x1, y1 = box = _box(shape.outline, size)
            if min(x1 - x0, y1 - y0) < 4:
                continue
            left, top, right, bottom = int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1))
            mask, edge = _masks(shape, extent, (left, top, right, bottom))
            region = slice(top, bottom), slice(left, right)
            after = owner.copy()
            after[region][mask > 0.5] = len(objects)
            still = np.bincount(after[after >= 0], minlength=len(objects) + 1)
            enough = [*needed, LEAST_VISIBLE * _polygon_area(shape)]
            if (still < enough).any():
                continue
            owner, needed = after, enough
            _paint(canvas[region], mask, edge, (left, top), extent, random)
            objects.append(Object(category + 1, box, float(mask.sum())))
            break
    noise = random.normal(0, 6, canvas.shape).astype(np.float32)
    return (canvas + noise).clip(0, 255).astype(np.uint8), objects


# Shapes ---------------------------------------------------------------------------------------------------------


def _regular(corners: int, radius: float, start: float = -np.pi / 2) -> np.ndarray:
    angles = start + 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    tips, dents = _regular(5, 0.62), _regular(5, 0.28, start=-np.pi / 2 + np.pi / 5)
    return np.stack([tips, dents], axis=1).reshape(-1, 2)


def _cross(arm: float = 0.17, reach: float = 0.52) -> np.ndarray:
    quarter = np.array([[arm, -reach], [arm, -arm], [reach, -arm]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


SHAPES = {
    "circle": Shape(_regular(64, 0.5)),
    "square": Shape(_regular(4, 0.62, start=np.pi / 4)),
    "triangle": Shape(_regular(3, 0.62)),
    "star": Shape(_star()),
    "ring": Shape(_regular(64, 0.52), _regular(64, 0.28)),
    "cross": Shape(_cross()),
}


def _placed(name: str, size: int, random: np.random.Generator) -> tuple[Shape, float]:
    """The shape at a random position, size and angle, in pixels, with its extent; up to a fifth lies outside."""
    extent = random.uniform(*EXTENT) * size
    angle = random.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = random.uniform(0.3 * extent, size - 0.3 * extent, 2)
    return Shape(*(None if part is None else extent * part @ turn + centre for part in SHAPES[name])), extent


def _box(outline: np.ndarray, size: int) -> tuple[float, float, float, float]:
    (x0, y0), (x1, y1) = outline.min(axis=0).clip(0, size), outline.max(axis=0).clip(0, size)
    return float(x0), float(y0), float(x1), float(y1)


def _polygon_area(shape: Shape) -> float:
    def area(points: np.ndarray) -> float:
        (x, y), (next_x, next_y) = points.T, np.roll(points, -1, axis=0).T
        return abs(float((x * next_y - next_x * y).sum())) / 2

    return area(shape.outline) - (0.0 if shape.hole is None else area(shape.hole))


def _masks(shape: Shape, extent: float, window: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel of `window` the shape covers, and how much its rim does: two arrays [h, w] in 0..1."""
    left, top, right, bottom = window
    size = ((right - left) * OVERSAMPLING, (bottom - top) * OVERSAMPLING)
    mask, rim = Image.new("L", size), Image.new("L", size)
    fill, stroke = ImageDraw.Draw(mask), ImageDraw.Draw(rim)
    width = round(OVERSAMPLING * (1 + extent / 20))
    for polygon, value in ((shape.outline, 255), (shape.hole, 0)):
        if polygon is not None:
            # Pillow counts samples from their centres, hence the half.
            points = [tuple(point) for point in (polygon - (left, top)) * OVERSAMPLING - 0.5]
            fill.polygon(points, fill=value)
            stroke.line([*points, points[0]], fill=255, width=width, joint="curve")
    covered, edge = (np.asarray(image.reduce(OVERSAMPLING), np.float32) / 255 for image in (mask, rim))
    return covered, np.minimum(edge, covered)


# Colours and textures -------------------------------------------------------------------------------------------


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _background(size: int, random: np.random.Generator) -> np.ndarray:
    """A muted gradient between two related colours with clouds over it: float32 [size, size, 3] in 0..255."""
    hue, value = random.uniform(), random.uniform(0.3, 0.75)
    first = _colour(hue, random.uniform(0.05, 0.3), value)
    second = _colour(hue + random.uniform(-0.15, 0.15), random.uniform(0.05, 0.3), value + random.uniform(-0.25, 0.25))
    angle = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    ramp = (x * np.cos(angle) + y * np.sin(angle) + 0.5).clip(0, 1)[..., None]
    clouds = random.normal(0, random.uniform(4, 14), (7, 7)).astype(np.float32)
    clouds = np.asarray(Image.fromarray(clouds).resize((size, size), Image.Resampling.BICUBIC))
    return first + (second - first) * ramp + clouds[..., None]


def _paint(
    region: np.ndarray,
    mask: np.ndarray,
    edge: np.ndarray,
    corner: tuple[int, int],
    extent: float,
    random: np.random.Generator,
) -> None:
    """Blend a textured fill and a darker rim into `region` [h, w, 3], in place."""
    hue, saturation, value = random.uniform(), random.uniform(0.55, 0.95), random.uniform(0.75, 1.0)
    light = _colour(hue, saturation, value)
    dark = _colour(hue + random.uniform(-0.06, 0.06), saturation, value * random.uniform(0.6, 0.8))
    fill = light + (dark - light) * _texture(mask.shape, corner, extent, random)[..., None]
    fill += (0.35 * dark - fill) * edge[..., None] * 0.8
    region += (fill - region) * mask[..., None]


def _texture(shape: tuple[int, int], corner: tuple[int, int], extent: float, random: np.random.Generator) -> np.ndarray:
    """A pattern [h, w] in 0..1: plain, stripes, checks, dots, gradient or speckle."""
    kind = random.choice(("plain", "stripes", "checks", "dots", "gradient", "speckle"))
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    angle = random.uniform(0, np.pi)
    period = max(3.0, extent * random.uniform(0.15, 0.3))
    u = (x + corner[0]) * np.cos(angle) + (y + corner[1]) * np.sin(angle)
    v = (y + corner[1]) * np.cos(angle) - (x + corner[0]) * np.sin(angle)
    wave_u, wave_v = np.sin(2 * np.pi * u / period), np.sin(2 * np.pi * v / period)
    if kind == "stripes":
        return (0.5 + 2 * wave_u).clip(0, 1)
    if kind == "checks":
        return (0.5 + 2 * wave_u * wave_v).clip(0, 1)
    if kind == "dots":
        return (2 * (wave_u + wave_v) - 1.5).clip(0, 1)
    if kind == "gradient":
        return (u - u.min()) / max(float(np.ptp(u)), 1.0)
    if kind == "speckle":
        return random.uniform(0, 1, shape).astype(np.float32)
    return np.zeros(shape, np.float32)
