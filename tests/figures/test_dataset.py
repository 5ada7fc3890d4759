"""Figures of a data set: classes, sizes, annotated images and padding."""

import numpy as np
import pandas as pd
import pytest
import torch

from detrlib.figures import dataset, style

pytestmark = pytest.mark.filterwarnings("error")

IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
NAMES = {1: "cat", 2: "dog"}
BOXES = np.array([[4.0, 6, 30, 40], [20, 10, 60, 44]])


def objects(counts, side=40.0):
    """A frame as of `CocoDataset.frame`: `counts` objects per class and one crowd."""
    rows = [(1, 0, name, side, side, side**2, False) for name, count in counts.items() for _ in range(count)]
    rows.append((1, 0, "crowd of cats", 99.0, 99.0, 99.0**2, True))
    return pd.DataFrame(rows, columns=["image_id", "label", "category", "width", "height", "area", "crowd"])


def test_class_histogram_counts_objects_without_crowds(texts):
    drawn = dataset.class_histogram(objects({"cat": 1, "dog": 3}))
    (axes,) = drawn.axes
    assert [bar.get_width() for bar in axes.patches] == [3, 1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "cat"]
    assert {"3  (75.0%)", "1  (25.0%)", "4 objects"} <= set(texts(drawn))


def test_class_histogram_sums_up_rare_classes(texts):
    drawn = dataset.class_histogram(objects({"cat": 1}), classes=["cat", "dog", "eel"])
    assert drawn.axes[0].get_xlabel() == "no objects in this split: dog, eel"
    drawn = dataset.class_histogram(objects({"a": 9, "b": 2, "c": 1}), most=1)
    assert len(drawn.axes[0].patches) == 1
    assert "and 2 rarer classes with 3 objects" in texts(drawn)


def test_dollar_signs_in_names_begin_no_formula(texts, tmp_path):
    names = {1: r"$\frac$", 2: "a$b$c"}  # the first is none that matplotlib can draw
    dataset.class_histogram(objects(dict.fromkeys(names.values(), 1))).savefig(tmp_path / "counts.png")
    dataset.annotated_images([IMAGE], [BOXES], [np.array([1, 2])], names).savefig(tmp_path / "images.png")


def test_size_distribution_divides_at_cocos_limits(texts):
    frame = pd.concat([objects({"a": 1}, side) for side in (31.9, 32.0, 95.9, 96.0)])
    drawn = dataset.size_distribution(frame)
    (axes,) = drawn.axes
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [32, 96]
    assert {"small 25%", "medium 50%", "large 25%"} <= set(texts(drawn))
    assert sum(bar.get_height() for bar in axes.patches) == 4


def test_sizes_in_view_are_those_at_the_image_size(texts):
    """At 240 pixels: 12, 16 (two cells of 8), 96 and 103 (the view)."""
    sides = np.array([12, 16, 96, 103]) / 240
    drawn = dataset.sizes_in_view(sides, 240, 8, 103, (88, 372))
    (axes,) = drawn.axes
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [16, 103]
    assert {"below two cells 25%", "seen whole 50%", "beyond the view 25%", "2 cells, 16", "view, 103"} <= set(
        texts(drawn)
    )
    assert "image_size 240" in axes.get_xlabel() and "88 to 372" in axes.get_xlabel()
    assert sum(bar.get_height() for bar in axes.patches) == 4
    none = dataset.sizes_in_view(sides, 240, 8, 103, (400, 100)).axes[0].get_xlabel()
    assert "no size" in none and "400" in none and "100" in none
    assert dataset.sizes_in_view(sides, 240, 8, 103).axes[0].get_xlabel().count("\n") == 0
    assert texts(dataset.sizes_in_view(np.array([]), 240, 8, 103)) == ["Nothing to show: there are no objects."]


@pytest.mark.parametrize("draw", [dataset.class_histogram, dataset.size_distribution])
def test_a_set_without_objects_has_nothing_to_show(draw, texts):
    assert texts(draw(objects({}))) == ["Nothing to show: there are no objects."]


def test_annotated_images_show_boxes_in_the_colour_of_their_class(boxes_in, titles):
    images = [IMAGE, IMAGE[:20], IMAGE, IMAGE]
    drawn = dataset.annotated_images(images, [BOXES, BOXES[:1], BOXES[:0], BOXES], [[1, 2], [2], [], [2, 2]], NAMES)
    assert titles(drawn) == [
        "48 high, 64 wide; 2 objects",
        "20 high, 64 wide; 1 object",
        "48 high, 64 wide; 0 objects",
        "48 high, 64 wide; 2 objects",
    ]
    cat, dog = (style.class_colour(label, NAMES) for label in NAMES)
    assert boxes_in(drawn.axes[0], cat) == [tuple(BOXES[0])] and boxes_in(drawn.axes[0], dog) == [tuple(BOXES[1])]
    assert boxes_in(drawn.axes[2]) == [] and len(boxes_in(drawn.axes[3], dog)) == 2
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["cat", "dog"]
    tensors = torch.tensor(BOXES), torch.tensor([1, 2])  # as data sets give them
    assert len(dataset.annotated_images([IMAGE], *([one] for one in tensors), NAMES).axes) == 1
    alone = dataset.annotated_images([IMAGE], [BOXES[:1]], [[2]], NAMES)
    assert boxes_in(alone.axes[0], dog) == [tuple(BOXES[0])]  # the same colour without cats


def test_objects_of_a_data_set_and_of_a_table_are_drawn_alike(boxes_in):
    """The first are tensors, the others a Series that counts the rows of another table."""
    for boxes, labels in ((torch.tensor(BOXES), torch.tensor([1, 2])), (BOXES, pd.Series([1, 2], index=[7, 3]))):
        drawn = dataset.annotated_images([IMAGE], [boxes], [labels], NAMES)
        assert len(boxes_in(drawn.axes[0])) == 2


def test_annotated_images_write_the_names_of_many_classes_at_the_boxes(titles, texts):
    many = {label: f"class {label}" for label in range(12)}
    height, width = IMAGE.shape[:2]
    corners = np.array([(x * width, y * height) for x in (0, 0.34, 0.68) for y in (0.15, 0.35, 0.55, 0.75)])
    boxes = np.hstack([corners, corners + 0.15 * height])
    drawn = dataset.annotated_images([IMAGE], [boxes], [range(12)], many, titles=["photograph"])
    assert drawn.legends == [] and titles(drawn) == ["photograph"]
    assert set(many.values()) <= set(texts(drawn))


def test_images_with_padding_covers_padding_and_nothing_else(boxes_in, titles, texts):
    mask = np.ones((2, 48, 64), dtype=bool)
    mask[0, :48, :64] = mask[1, :30, :32] = False
    drawn = dataset.images_with_padding(np.stack([IMAGE, IMAGE]), mask, [BOXES, BOXES[:1]], [[1, 2], [2]], NAMES)
    assert titles(drawn) == ["48 high, 64 wide; fills 100%", "30 high, 32 wide; fills 31%"]
    for axes, padding in zip(drawn.axes, mask, strict=True):
        shown = np.asarray(axes.images[0].get_array())
        assert (shown[~padding] == IMAGE[~padding]).all()
        assert set(np.unique(shown[padding])) == (set(dataset.STRIPES) if padding.any() else set())
    dog = style.class_colour(2, NAMES)
    assert [len(boxes_in(axes, dog)) for axes in drawn.axes] == [1, 1] and {"cat", "dog"} <= set(texts(drawn))
    assert "padded: 48 high, 64 wide" in texts(drawn)
