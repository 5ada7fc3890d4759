"""Figures: every function draws small inputs without a warning and shows what it promises."""

import numpy as np
import pandas as pd
import pytest
from drawn import leaves_nothing_behind, texts  # noqa: F401
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detrlib.figures import attention, dataset, results, style, tables
from detrlib.runs.examples import Example

pytestmark = pytest.mark.filterwarnings("error")

RUNS = ["seed1_softmax", "seed1_entmax15"]


def titles(drawn: Figure) -> list[str]:
    return [axes.get_title(loc="left") or axes.get_title() for axes in drawn.axes]


def boxes_in(axes, colour=None) -> list[tuple]:
    """xyxy of the rectangles drawn on an axes, the white rims left out."""
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    shown = [patch for patch in found if to_hex(patch.get_edgecolor()) not in ("#ffffff",)]
    wanted = [patch for patch in shown if colour is None or to_hex(patch.get_edgecolor()) == colour.lower()]
    return [tuple(patch.get_bbox().extents) for patch in wanted]


# --- style -----------------------------------------------------------------------------------------------------


def test_transforms_and_the_palette_are_distinct():
    assert len(set(style.COLOURS.values())) == len(style.COLOURS)
    assert set(style.COLOURS.values()) <= set(style.PALETTE) and len(set(style.PALETTE)) == len(style.PALETTE)


@pytest.mark.parametrize("name", style.COLOURS)
def test_a_transform_keeps_its_colour_whatever_runs_stand_beside_it(name):
    run = f"shapes_{name}_seed3"
    for runs in ([run], [run, "baseline"], ["baseline", "other", run], [*(f"x-{n}" for n in style.PALETTE), run]):
        assert style.run_colours(runs)[run] == style.COLOURS[name]


def test_runs_of_one_transform_get_different_colours():
    colours = style.run_colours(["softmax_a", "softmax_b", "plain"])
    assert len(set(colours.values())) == 3 and colours["softmax_a"] == style.COLOURS["softmax"]
    assert colours["plain"] not in style.COLOURS.values()
    assert len(style.run_colours([f"run{number}" for number in range(20)])) == 20


def test_figures_are_as_wide_as_asked_and_styled_for_themselves_only():
    drawn, _ = style.figure(width=0.5, aspect=2)
    assert np.allclose(drawn.get_size_inches(), (0.5 * style.TEXT_WIDTH, style.TEXT_WIDTH))
    assert drawn.dpi == style.STYLE["figure.dpi"]


def test_save_writes_pdf_png_and_the_note(tmp_path):
    drawn, axes = style.figure()
    axes.set_title("readable text")
    paths = style.save(drawn, tmp_path / "new", "gini", "runs: a, b")
    assert [path.name for path in paths] == ["gini.pdf", "gini.png", "gini.txt"]
    pdf, png, note = (path.read_bytes() for path in paths)
    assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, not outlines
    assert png.startswith(b"\x89PNG") and note == b"runs: a, b\n"
    assert style.save(drawn, tmp_path / "again", "gini", "")[0].read_bytes() == pdf


# --- results ---------------------------------------------------------------------------------------------------


def history():
    rows = [(run, epoch, name, epoch / 10) for run in RUNS for epoch in range(4) for name in ("AP", "loss")]
    return pd.DataFrame(rows, columns=["run", "epoch", "metric", "value"])


def test_training_curves_have_a_panel_per_metric_and_a_line_per_run():
    drawn = results.training_curves(history(), ["AP", "loss"], {"AP": "average precision"})
    assert titles(drawn) == ["average precision", "loss"]
    for axes in drawn.axes:
        assert [line.get_color() for line in axes.get_lines()] == [style.COLOURS["softmax"], style.COLOURS["entmax15"]]
        assert np.allclose(axes.get_lines()[0].get_ydata(), [0, 0.1, 0.2, 0.3])
    assert set(RUNS) <= set(texts(drawn))
    with pytest.raises(ValueError, match=r"no values of \['AR'\]"):
        results.training_curves(history(), ["AR"])


def test_training_curves_average_repeats_and_show_single_points():
    frame = pd.DataFrame({"run": "a", "epoch": [1, 1], "metric": "AP", "value": [0.2, 0.4]})
    (line,) = results.training_curves(frame, ["AP"]).axes[0].get_lines()
    assert np.allclose(line.get_ydata(), [0.3]) and line.get_marker() == "o"


def test_bars_carry_their_values():
    table = pd.DataFrame({"AP": [0.4321, 12.34], "AP_small": [-1.0, np.nan]}, index=RUNS)
    drawn = results.bars(table, ["AP", "AP_small"], {"AP_small": "small"})
    assert titles(drawn) == ["AP", "small"]
    assert {"0.432", "12.3", "n/a", *RUNS} <= set(texts(drawn))
    first, second = drawn.axes
    assert np.allclose([bar.get_width() for bar in first.patches], [0.4321, 12.34])
    assert [bar.get_width() for bar in second.patches] == [0, 0]
    assert [to_hex(bar.get_facecolor()).upper() for bar in first.patches] == [
        style.COLOURS["softmax"],
        style.COLOURS["entmax15"],
    ]


def test_per_layer_counts_layers_from_one_and_bands_repeats():
    rows = [("gini", run, layer, layer + spread) for run in RUNS for layer in range(3) for spread in (-0.1, 0.1)]
    frame = pd.DataFrame(rows, columns=["metric", "run", "layer", "value"])
    (axes,) = results.per_layer(frame, {"gini": "Gini"}).axes
    line = axes.get_lines()[0]
    assert list(line.get_xdata()) == [1, 2, 3] and np.allclose(line.get_ydata(), [0, 1, 2])
    assert axes.get_title(loc="left") == "Gini" and line.get_color() == style.COLOURS["softmax"]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(2 + np.std([-0.1, 0.1], ddof=1))
    assert set(RUNS) <= set(texts(axes.figure))


def test_per_layer_sets_a_second_state_apart():
    states = pd.concat(
        pd.DataFrame({"metric": name, "run": RUNS[0], "layer": [0, 1], "value": [shift, 1 + shift], "state": state})
        for name in ("gini", "paibb")
        for state, shift in (("trained", 0.0), ("untrained", 0.5))
    )
    drawn = results.per_layer(states, {"gini": "Gini", "paibb": "PAIBB"})
    assert titles(drawn) == ["Gini", "PAIBB"]
    for axes in drawn.axes:
        solid, dashed = axes.get_lines()
        assert solid.get_linestyle() == "-" and list(solid.get_ydata()) == [0, 1]
        assert dashed.get_linestyle() == "--" and list(dashed.get_ydata()) == [0.5, 1.5]
        assert not axes.collections, "a single value has no band"
    assert "solid: trained, dashed: untrained" in texts(drawn)


def test_alpha_heatmap_writes_every_value():
    drawn = results.alpha_heatmap({"a": [[1.0, 1.25], [1.5, 2.0], [1.75, 1.1]], "b": [[1.33]]})
    assert titles(drawn)[:2] == ["a", "b"]
    assert {"1.25", "2.00", "1.10", "1.33", "1 softmax", "2 sparsemax"} <= set(texts(drawn))
    assert all(axes.images[0].get_clim() == (1, 2) for axes in drawn.axes[:2])


def test_alpha_over_training_has_a_row_per_run_and_a_column_per_layer():
    rows = [
        (run, epoch, layer, head, 1.5 + 0.1 * head)
        for run in RUNS
        for epoch in range(3)
        for layer in range(2)
        for head in range(4)
    ]
    drawn = results.heads_over_training(pd.DataFrame(rows, columns=["run", "epoch", "layer", "head", "value"]))
    assert len(drawn.axes) == 4 and all(len(axes.get_lines()) == 4 for axes in drawn.axes)
    assert {"layer 1", "layer 2", "head 1", "head 4", "epoch"} <= set(texts(drawn))
    assert [axes.get_ylabel() for axes in drawn.axes] == [f"{RUNS[0]}\nalpha", "", f"{RUNS[1]}\nalpha", ""]


def table():
    values = {"AP": [0.412, 0.4119, 0.3], "loss": [1.5, np.nan, 0.7], "epochs": [5, 6, 7], "kind": ["x", "y", "z"]}
    return pd.DataFrame(values, index=pd.Index(["soft_max", "50%", "a & b"], name="run"))


ARGUMENTS = {"formats": {"AP": ".2f", "loss": ".1f"}, "lower_is_better": ["loss"], "unranked": ["epochs"]}


def test_markdown_table_bolds_the_best():
    assert tables.markdown_table(table(), **ARGUMENTS).splitlines() == [
        "| run | AP | loss | epochs | kind |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| soft_max | **0.41** | 1.5 | 5 | x |",
        "| 50% | **0.41** | – | 6 | y |",
        "| a & b | 0.30 | **0.7** | 7 | z |",
    ]


def test_latex_table_bolds_the_best_and_escapes_names():
    lines = tables.latex_table(table(), caption=r"\emph{AP}", label="tab:ap", **ARGUMENTS).splitlines()
    assert r"\caption{\emph{AP}}" in lines and r"\label{tab:ap}" in lines and r"\begin{tabular}{lrrrr}" in lines
    start = lines.index(r"\midrule")
    assert lines[start + 1 : start + 4] == [
        r"soft\_max & \textbf{0.41} & 1.5 & 5 & x \\",
        r"50\% & \textbf{0.41} & – & 6 & y \\",
        r"a \& b & 0.30 & \textbf{0.7} & 7 & z \\",
    ]


def test_tables_without_a_winner_have_no_bold_and_unknown_columns_are_refused():
    tie = pd.DataFrame({"AP": [0.5, 0.5]}, index=RUNS)
    assert "**" not in tables.markdown_table(tie, {})
    for wrong in ({"formats": {"ap": ".1f"}}, {"formats": {}, "lower_is_better": ["ap"]}):
        with pytest.raises(ValueError, match=r"no columns \['ap'\]"):
            tables.markdown_table(tie, **wrong)


# --- attention -------------------------------------------------------------------------------------------------

IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
NAMES = {1: "cat", 2: "dog"}
BOXES = np.array([[4.0, 6, 30, 40], [20, 10, 60, 44]])


def maps(*shape):
    """Random maps of 3 x 4 cells, most of them zero."""
    weights = np.random.default_rng(1).random((*shape, 3, 4)).astype(np.float32)
    weights[weights < 0.5] = 0
    return weights


def test_detections_show_their_class_score_box_and_map():
    drawn = attention.detections_with_attention(
        IMAGE, BOXES, [1, 2], [0.91, 0.5], maps(2), BOXES[:1], [1], NAMES, max_queries=3
    )
    visible = [axes for axes in drawn.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in visible] == ["1 object", "cat 0.91", "dog 0.50"]
    assert boxes_in(visible[0], "#000000") == [tuple(BOXES[0])]  # ground truth
    for number, axes in enumerate(visible[1:]):
        assert boxes_in(axes) == boxes_in(visible[0], style.PALETTE[number]) == [tuple(BOXES[number])]
        assert len(axes.images) == 2


def test_a_map_covers_the_image_or_reaches_beyond_it():
    _, axes = style.figure()
    weights = maps()
    attention.draw_map(axes, IMAGE, weights)
    assert axes.images[1].get_extent() == [-0.5, 63.5, 47.5, -0.5]
    assert (np.asarray(axes.images[1].get_alpha())[weights == 0] == 0).all()  # no weight leaves the image as it is
    _, axes = style.figure()
    attention.draw_map(axes, IMAGE, weights, extent=np.array([2.4, 4.0]))  # of 3 rows, 2.4 lie on the image
    assert np.allclose(axes.images[1].get_extent(), [-0.5, 63.5, 59.5, -0.5])
    assert axes.get_ylim() == (47.5, -0.5)


def example(matched):
    return Example(
        image_id=7,
        image=IMAGE,
        true_boxes=BOXES,
        true_labels=np.array([1, 2]),
        boxes=np.concatenate([BOXES, BOXES[:1]]),
        labels=np.array([1, 2, 2]),
        scores=np.array([0.9, 0.8, 0.1]),
        matched=np.array(matched),
        stored={"decoder_cross": maps(2, 4, 3)},
        queries=np.arange(3),
        extent=np.array([3.0, 4.0]),
    )


def test_compare_runs_has_a_row_per_run_and_a_column_per_object():
    drawn = attention.compare_runs({"one": example([0, 1, -1]), "two": example([0, -1, -1])}, NAMES)
    assert len(drawn.axes) == 6
    assert titles(drawn)[:3] == ["one", "dog 0.80", "cat 0.90"]  # the largest object first
    assert titles(drawn)[3] == "two" and titles(drawn)[5] == "cat 0.90"
    assert len(drawn.axes[4].images) == 1  # nothing was matched to that object: no map


def test_layers_grid_has_a_row_per_layer_and_the_mean_before_the_heads():
    drawn = attention.layers_grid(IMAGE, maps(2, 3), BOXES[0])
    assert len(drawn.axes) == 2 * 4
    assert titles(drawn)[:4] == ["layer 1, mean", "head 1", "head 2", "head 3"]
    assert titles(drawn)[4:] == ["layer 2, mean", "", "", ""]
    assert all(boxes_in(axes) == [tuple(BOXES[0])] for axes in drawn.axes)


def test_single_map_counts_the_cells_with_weight():
    weights = maps()
    drawn = attention.single_map(IMAGE, weights, BOXES[1], "a cat")
    assert titles(drawn) == ["a cat", f"{(weights > 0).sum()} of 12 cells have weight"]


# --- data sets -------------------------------------------------------------------------------------------------


def objects(counts, side=40.0):
    """A frame as of `CocoDataset.frame`: `counts` objects per class and one crowd."""
    rows = [(1, 0, name, side, side, side**2, False) for name, count in counts.items() for _ in range(count)]
    rows.append((1, 0, "crowd of cats", 99.0, 99.0, 99.0**2, True))
    return pd.DataFrame(rows, columns=["image_id", "label", "category", "width", "height", "area", "crowd"])


def test_class_histogram_counts_objects_without_crowds():
    drawn = dataset.class_histogram(objects({"cat": 1, "dog": 3}))
    (axes,) = drawn.axes
    assert [bar.get_width() for bar in axes.patches] == [3, 1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "cat"]
    assert {"3  (75.0%)", "1  (25.0%)", "4 objects"} <= set(texts(drawn))


def test_class_histogram_sums_up_rare_classes():
    drawn = dataset.class_histogram(objects({"a": 9, "b": 2, "c": 1}), most=1)
    assert len(drawn.axes[0].patches) == 1
    assert "and 2 rarer classes with 3 objects" in texts(drawn)


def test_size_distribution_divides_at_cocos_limits():
    frame = pd.concat([objects({"a": 1}, side) for side in (31.9, 32.0, 95.9, 96.0)])
    drawn = dataset.size_distribution(frame)
    (axes,) = drawn.axes
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [32, 96]
    assert {"small 25%", "medium 50%", "large 25%"} <= set(texts(drawn))
    assert sum(bar.get_height() for bar in axes.patches) == 4


@pytest.mark.parametrize("draw", [dataset.class_histogram, dataset.size_distribution])
def test_a_set_without_objects_can_be_drawn(draw):
    draw(objects({})).canvas.draw()


def test_annotated_images_show_boxes_in_the_colour_of_their_class():
    images = [IMAGE, IMAGE[:20], IMAGE, IMAGE]
    drawn = dataset.annotated_images(images, [BOXES, BOXES[:1], BOXES[:0], BOXES], [[1, 2], [2], [], [2, 2]], NAMES)
    assert titles(drawn) == ["48 × 64, 2 objects", "20 × 64, 1 object", "48 × 64, 0 objects", "48 × 64, 2 objects"]
    cat, dog = style.PALETTE[:2]
    assert boxes_in(drawn.axes[0], cat) == [tuple(BOXES[0])] and boxes_in(drawn.axes[0], dog) == [tuple(BOXES[1])]
    assert boxes_in(drawn.axes[2]) == [] and len(boxes_in(drawn.axes[3], dog)) == 2
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["cat", "dog"]
    alone = dataset.annotated_images([IMAGE], [BOXES[:1]], [[2]], NAMES)
    assert boxes_in(alone.axes[0], dog) == [tuple(BOXES[0])]  # the same colour without cats


def test_annotated_images_write_the_names_of_many_classes_at_the_boxes():
    many = {label: f"class {label}" for label in range(12)}
    drawn = dataset.annotated_images([IMAGE], [np.tile(BOXES[0], (12, 1))], [range(12)], many, titles=["photograph"])
    assert drawn.legends == [] and titles(drawn) == ["photograph"]
    assert set(many.values()) <= set(texts(drawn))


def test_padded_batch_covers_padding_and_nothing_else():
    mask = np.ones((2, 48, 64), dtype=bool)
    mask[0, :48, :64] = mask[1, :30, :32] = False
    drawn = dataset.padded_batch(np.stack([IMAGE, IMAGE]), mask, [BOXES, BOXES[:1]])
    assert titles(drawn) == ["48 × 64, fills 100%", "30 × 32, fills 31%"]
    for axes, padding in zip(drawn.axes, mask, strict=True):
        shown = np.asarray(axes.images[0].get_array())
        assert (shown[~padding] == IMAGE[~padding]).all()
        assert set(np.unique(shown[padding])) == (set(dataset.STRIPES) if padding.any() else set())
    assert [len(boxes_in(axes)) for axes in drawn.axes] == [2, 1]
    assert "padded to 48 × 64" in texts(drawn)
