"""Augmentation: sizes as in DETR, and boxes that stay on their pixels through every draw."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2_functional

from detrlib.data.augment import (
    MEAN,
    STD,
    Crop,
    DetectionTransform,
    Draws,
    RandomSidesCrop,
    Resize,
    ResizeShorter,
    build_augmentation,
    largest_canvas,
    normalised,
)

RED = (250, 10, 10)


def size_in_detr(image_size, size, max_size=None):
    """`get_size_with_aspect_ratio` of facebookresearch/detr, in its order of operations: (w, h) -> (h, w)."""
    w, h = image_size
    if max_size is not None:
        low, high = float(min((w, h))), float(max((w, h)))
        if high / low * size > max_size:
            size = round(max_size * low / high)
    if (w <= h and w == size) or (h <= w and h == size):
        return h, w
    return (int(size * h / w), size) if w < h else (size, int(size * w / h))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 333), (333, 500), (1000, 120), (800, 800), (57, 91)])
def test_validation_resizes_as_detr_does(size):
    transform = build_augmentation(800)
    image, _, _ = transform(Image.new("RGB", size), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert tuple(image.shape[-2:]) == size_in_detr(size, 800, 1333)


@pytest.mark.parametrize(("size", "smaller"), [((5000, 1), (106, 1)), ((1, 5000), (1, 106)), ((2, 9000), (1, 106))])
def test_a_line_of_pixels_is_no_longer_than_other_images(size, smaller):
    image, boxes, _ = build_augmentation(64)(Image.new("RGB", size[::-1]), torch.ones(1, 4), torch.zeros(1))
    assert tuple(image.shape[-2:]) == smaller and boxes.isfinite().all()


def test_training_sizes_are_detrs():
    transform, drawn = build_augmentation(800, "detr", train=True), set()
    torch.manual_seed(0)
    for _ in range(400):
        steps = transform.draw((48, 64))
        if not any(isinstance(step, Crop) for step in steps):
            drawn.add(tuple(steps[-1]))
    assert drawn == {size_in_detr((64, 48), side, 1333) for side in range(480, 801, 32)}


def with_rectangle(width=96, height=72, box=(30, 20, 60, 44)):
    image = Image.new("RGB", (width, height), (40, 90, 40))
    x0, y0, x1, y1 = box
    image.paste(RED, (x0, y0, x1, y1))
    return image, torch.tensor([box], dtype=torch.float32), torch.tensor([5])


def reddish(image):
    """Which pixels of an image show the rectangle: bool [H, W]."""
    red, green, _ = image.int()
    return red - green > 102


def test_boxes_stay_on_their_pixels_through_every_draw():
    transform = build_augmentation(96, "detr", train=True)
    kept = 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, boxes, labels = transform(*with_rectangle())
        rows, columns = torch.nonzero(reddish(image), as_tuple=True)
        if not len(boxes):
            assert len(rows) <= 2 * max(image.shape)  # at most a blurred line at the edge
            continue
        kept += 1
        seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (boxes[0] - seen).abs().max() < 1.6, seed
        assert labels.tolist() == [5] and (boxes >= 0).all()
    assert kept > 40


def test_crops_are_drawn_and_cut_boxes():
    crop = DetectionTransform(RandomSidesCrop(30, 50))
    areas = set()
    for seed in range(20):
        torch.manual_seed(seed)
        image, boxes, _ = crop(*with_rectangle())
        assert all(30 <= side <= 50 for side in image.shape[-2:])
        inside = int(reddish(image).sum())
        assert inside == sum(((boxes[:, 2:] - boxes[:, :2]).prod(1)).tolist())  # exact: nothing is resized
        areas.add(inside)
    assert len(areas) > 5 and max(areas) <= 30 * 24


def test_objects_outside_the_crop_go_with_their_labels():
    crop = DetectionTransform(RandomSidesCrop(20, 20))
    image, _, _ = with_rectangle(20, 400, (5, 5, 10, 10))
    boxes, labels = torch.tensor([[5.0, 5, 10, 10], [5, 100, 10, 110], [0, 0, 20, 400]]), torch.tensor([1, 2, 3])
    torch.manual_seed(0)
    _, boxes, labels = crop(image, boxes, labels)
    assert len(boxes) == len(labels) < 3 and labels[-1] == 3 and boxes[-1].tolist() == [0, 0, 20, 20]


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (3, 5), (1, 1)])
def test_narrow_images_pass_every_recipe(size):
    for recipe in ("detr", "flip", "none"):
        for seed in range(8):
            torch.manual_seed(seed)
            transform = build_augmentation(64, recipe, train=True)
            boxes = torch.tensor([[0.0, 0, *size]])
            image, boxes, _ = transform(Image.new("RGB", size), boxes, torch.tensor([1]))
            height, width = image.shape[-2:]
            assert boxes.tolist() == [[0, 0, width, height]] and min(height, width) >= 1


def test_a_flip_mirrors_boxes():
    transform = build_augmentation(72, "flip", train=True)  # the shorter side as it is
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, boxes, _ = transform(*with_rectangle(box=(10, 20, 30, 44)))
        (x0, y0, x1, y1) = (int(value) for value in boxes[0])
        assert reddish(image)[y0:y1, x0:x1].all() and reddish(image).sum() == 20 * 24
        seen.add((x0, y0, x1, y1))
    assert seen == {(10, 20, 30, 44), (66, 20, 86, 44)}


def test_a_resize_to_the_same_size_touches_no_pixel():
    image, boxes, labels = with_rectangle()
    pixels, after, _ = build_augmentation(72)(image, boxes, labels)
    assert torch.equal(after, boxes)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
    assert ResizeShorter([72])((72, 96), Draws()) == []


def test_validation_and_recipe_none_draw_nothing_at_random():
    results = [
        build_augmentation(48, recipe, train)(*with_rectangle())[0]
        for recipe, train in (("detr", False), ("flip", False), ("none", True))
    ]
    assert all(torch.equal(result, results[0]) for result in results)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="unknown recipe 'mosaic'"):
        build_augmentation(64, "mosaic")


@pytest.mark.parametrize("recipe", ["detr", "flip", "none"])
@pytest.mark.parametrize("size", [(480, 640), (200, 900), (90, 100), (1000, 300)])
def test_the_largest_size_is_that_of_the_largest_draw(recipe, size):
    """A crop is a part of an image that was resized before: what it is enlarged to shows no more of the picture."""
    transform, seen = build_augmentation(128, recipe, train=True), set()
    for seed in range(60):
        resizes = [step for step in transform.draw(size, str(seed)) if isinstance(step, Resize)]
        seen.add(tuple(resizes[0]))
    assert transform.largest(*size) == min(size, max(seen))


def test_a_batch_may_share_its_sizes_but_neither_flips_nor_places_of_crops():
    pixels, boxes, labels = with_rectangle()
    transform, same, shapes = build_augmentation(64, "detr", train=True, scales="batch"), 0, set()
    for batch in range(40):
        images = [transform(pixels, boxes, labels, (f"{batch} {image}", str(batch)))[0] for image in range(6)]
        (shape,) = {image.shape for image in images}
        shapes.add(shape)
        same += all(torch.equal(images[0], image) for image in images)
    assert len(shapes) > 20 and same == 0
    assert len({transform(pixels, boxes, labels)[0].shape for _ in range(20)}) > 5  # alone each has its own


def test_images_meet_the_same_sizes_whoever_draws_them():
    """Means and quantiles of 1,500 draws differ by less than five standard errors, some 0.5 of a spread of 4 pixels."""
    pixels, boxes, labels = with_rectangle(48, 36, (10, 10, 30, 30))
    drawn = {}
    for scales in ("image", "batch"):
        transform = build_augmentation(32, "detr", train=True, scales=scales)
        draws = ((f"{number} {scales}", f"{number}") for number in range(1500))
        drawn[scales] = np.array([transform(pixels, boxes, labels, each)[0].shape[-2:] for each in draws])
    assert np.allclose(drawn["image"].mean(0), drawn["batch"].mean(0), atol=0.6)
    assert set(drawn["image"].min(1)) == set(drawn["batch"].min(1))
    shares = [np.bincount(sides.min(1), minlength=40) / len(sides) for sides in drawn.values()]
    assert np.abs(shares[0] - shares[1]).max() < 0.05


@pytest.mark.parametrize("recipe", ["detr", "flip", "none"])
def test_no_batch_is_larger_than_the_largest_canvas(recipe):
    """Nor than the largest single image, and both are nearly met."""
    sizes, image_size = [(64, 48), (50, 90), (60, 60)], 80
    transform = build_augmentation(image_size, recipe, train=True)
    torch.manual_seed(0)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    drawn = [
        transform(torch.zeros(3, height, width, dtype=torch.uint8), *nothing)[0].shape[-2:]
        for width, height in sizes
        for _ in range(200)
    ]
    highest, widest = (max(sides) for sides in zip(*drawn, strict=True))
    height, width = largest_canvas(sizes, image_size, recipe, images=2)
    assert 0.9 * height <= highest <= height and 0.9 * width <= widest <= width
    height, width = largest_canvas(sizes, image_size, recipe, images=1)
    assert 0.9 * height * width <= max(h * w for h, w in drawn) <= height * width


def test_the_largest_canvas_of_coco_is_as_high_as_it_is_wide():
    coco = [(640, 480), (480, 640), (640, 320)]
    assert largest_canvas(coco, 800, "none", images=1) == (666, 1332)
    assert largest_canvas(coco, 800, "none", images=2) == (1066, 1332)
    assert largest_canvas(coco, 800, "detr", images=2) == (1250, 1332)


def test_models_see_what_was_normalised_one_image_at_a_time_and_zeros_around_it():
    """A batch of 8 bit numbers, in whatever order of memory, gives what official code makes of each picture."""
    pixels, padding = torch.randint(256, (2, 3, 20, 30), dtype=torch.uint8), torch.zeros(2, 20, 30, dtype=torch.bool)
    padding[0, 15:], padding[1, :, 11:] = True, True
    expected = v2_functional.normalize(pixels / 255, MEAN, STD)
    for given in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        images = normalised(given, padding)
        assert images.dtype == torch.float32 and images.is_contiguous()
        inside = ~padding[:, None].expand_as(images)
        torch.testing.assert_close(images[inside], expected[inside], atol=1e-6, rtol=1e-6)
        assert (images[~inside] == 0).all() and (pixels[~inside] > 0).any()
        torch.testing.assert_close(normalised(given), expected, atol=1e-6, rtol=1e-6)
    assert normalised(expected, padding) is expected  # floating point numbers are taken for normalised


def test_images_of_different_sizes_meet_the_same_sizes_in_a_batch():
    """However many numbers an image has to choose from, the draws after that are the same."""
    transform = build_augmentation(800, "detr", train=True, scales="batch")
    for batch in range(40):
        drawn = [transform.draw(size, f"{batch} {size}", str(batch)) for size in ((481, 641), (501, 331), (2000, 3000))]
        cropped = [any(isinstance(step, Crop) for step in steps) for steps in drawn]
        first = [next(min(step) for step in steps if isinstance(step, Resize)) for steps in drawn]
        assert len(set(cropped)) == len(set(first)) == 1
