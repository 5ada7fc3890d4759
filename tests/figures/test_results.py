"""Figures of results: every function draws small tables without a warning and shows what it promises."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from detrlib.figures import results, style

pytestmark = pytest.mark.filterwarnings("error")

RUNS = ["seed1_softmax", "seed1_entmax15"]


def history():
    rows = [(run, epoch, name, epoch / 10) for run in RUNS for epoch in range(4) for name in ("AP", "loss")]
    return pd.DataFrame(rows, columns=["run", "epoch", "metric", "value"])


def test_training_curves_have_a_panel_per_metric_and_a_line_per_run(titles, texts):
    drawn = results.training_curves(history(), ["AP", "loss"], {"AP": "average precision"})
    assert titles(drawn) == ["average precision", "loss"]
    for axes in drawn.axes:
        assert [line.get_color() for line in axes.get_lines()] == [style.COLOURS["softmax"], style.COLOURS["entmax15"]]
        assert np.allclose(axes.get_lines()[0].get_ydata(), [0, 0.1, 0.2, 0.3])
    assert set(RUNS) <= set(texts(drawn))


def test_training_curves_name_metrics_without_values(titles, texts):
    drawn = results.training_curves(history(), ["AP", "AR"], {"AR": "recall"})
    assert titles(drawn) == ["AP"] and "no values of recall" in texts(drawn)
    (words,) = texts(results.training_curves(history(), ["AR"]))
    assert "no values of AR; there are AP, loss" in words.replace("\n", " ")


def test_training_curves_average_repeats_and_show_single_points():
    frame = pd.DataFrame({"run": "a", "epoch": [1, 1], "metric": "AP", "value": [0.2, 0.4]})
    (line,) = results.training_curves(frame, ["AP"]).axes[0].get_lines()
    assert np.allclose(line.get_ydata(), [0.3]) and line.get_marker() == "o"


def test_training_curves_reach_from_the_lowest_seed_to_the_highest():
    rows = [("a", epoch, "AP", value + epoch) for epoch in (1, 2) for value in (0.1, 0.2, 0.6)]
    frame = pd.DataFrame(rows, columns=["run", "epoch", "metric", "value"])
    (axes,) = results.training_curves(frame, ["AP"]).axes
    assert np.allclose(axes.get_lines()[0].get_ydata(), [1.3, 2.3])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1.1, 2.6))


def test_titles_of_curves_do_not_run_into_each_other():
    rows = [("a", epoch, name, epoch) for epoch in (1, 2) for name in results.CURVES]
    frame = pd.DataFrame(rows, columns=["run", "epoch", "metric", "value"])
    drawn = results.training_curves(frame, list(results.CURVES), results.CURVES)
    drawn.draw_without_rendering()
    for axes, title in zip(drawn.axes, results.CURVES.values(), strict=True):
        (words,) = axes.findobj(lambda part, title=title: isinstance(part, Text) and part.get_text() == title)
        assert words.get_window_extent().x1 <= axes.bbox.x1


def test_bars_carry_their_values(titles, texts):
    table = pd.DataFrame({"AP": [0.4321, 12.34], "AP_small": [np.nan, np.nan]}, index=RUNS)
    drawn = results.bars(table, ["AP", "AP_small"], {"AP_small": "small"})
    assert titles(drawn) == ["AP", "small"]
    assert {"0.432", "12.3", "–", *RUNS} <= set(texts(drawn))
    first, second = drawn.axes
    assert np.allclose([bar.get_width() for bar in first.patches], [0.4321, 12.34])
    assert [bar.get_width() for bar in second.patches] == [0, 0]
    assert [to_hex(bar.get_facecolor()).upper() for bar in first.patches] == [
        style.COLOURS["softmax"],
        style.COLOURS["entmax15"],
    ]


def test_per_layer_counts_layers_from_one_and_bands_repeats(texts):
    rows = [("gini", run, layer, layer / 4 + spread) for run in RUNS for layer in range(3) for spread in (-0.1, 0.1)]
    frame = pd.DataFrame(rows, columns=["metric", "run", "layer", "value"])
    (axes,) = results.per_layer(frame, {"gini": "Gini"}).axes
    line = axes.get_lines()[0]
    assert list(line.get_xdata()) == [1, 2, 3] and np.allclose(line.get_ydata(), [0, 0.25, 0.5])
    assert axes.get_title(loc="left") == "Gini" and line.get_color() == style.COLOURS["softmax"]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.5 + np.std([-0.1, 0.1], ddof=1))
    assert band[:, 1].min() == 0  # where no Gini index can be
    assert set(RUNS) <= set(texts(axes.figure))


def test_per_layer_sets_a_second_state_apart(titles, texts):
    states = pd.concat(
        pd.DataFrame({"metric": name, "run": RUNS[0], "layer": [0, 1], "value": [shift, 1 + shift], "state": state})
        for name in ("gini", "paibb")
        for state, shift in (("trained", 0.0), ("untrained", 0.5))
    )
    drawn = results.per_layer(states, {"gini": "Gini", "paibb": "PAIBB"})
    assert titles(drawn) == ["Gini", "PAIBB"]
    for axes in drawn.axes:
        dashed, solid = axes.get_lines()
        assert solid.get_linestyle() == "-" and list(solid.get_ydata()) == [0, 1]
        assert dashed.get_linestyle() == "--" and list(dashed.get_ydata()) == [0.5, 1.5]
        assert not any(np.isfinite(path.vertices).any() for band in axes.collections for path in band.get_paths())
    assert "solid: trained, dashed: untrained" in texts(drawn)


def test_alpha_heatmap_writes_every_value(titles, texts):
    drawn = results.alpha_heatmap({"a": [[1.0, 1.25], [1.5, 2.0], [1.75, 1.1]], "b": [[1.33]]})
    assert titles(drawn)[:2] == ["a", "b"]
    assert {"1.25", "2.00", "1.10", "1.33", "1 softmax", "2 sparsemax"} <= set(texts(drawn))
    assert all(axes.collections[0].get_clim() == (1, 2) for axes in drawn.axes[:2])


def test_alpha_over_training_has_a_row_per_run_and_a_column_per_layer(texts):
    rows = [
        (run, epoch, layer, head, 1.5 + 0.1 * head)
        for run in RUNS
        for epoch in range(3)
        for layer in range(2)
        for head in range(4)
    ]
    drawn = results.heads_over_training(pd.DataFrame(rows, columns=["run", "epoch", "layer", "head", "value"]))
    assert len(drawn.axes) == 4 and all(len(axes.get_lines()) == 4 for axes in drawn.axes)
    assert {"layer 1", "layer 2", "epoch; at the ends of lines the numbers of heads"} <= set(texts(drawn))
    for axes in drawn.axes:  # the heads were drawn in the order of their values
        numbers = sorted(axes.texts, key=lambda text: text.get_position()[1])
        assert [text.get_text() for text in numbers] == ["1", "2", "3", "4"]
    assert [axes.get_ylabel() for axes in drawn.axes] == [f"{RUNS[0]}\nalpha", "", f"{RUNS[1]}\nalpha", ""]


def test_heads_of_several_sites_have_rows_of_their_own():
    rows = [("a", epoch, site, 0, 0, 1.5) for site in ("encoder_self", "decoder_cross") for epoch in (0, 1)]
    frame = pd.DataFrame(rows, columns=["run", "epoch", "site", "layer", "head", "value"])
    drawn = results.heads_over_training(frame)
    assert [axes.get_ylabel() for axes in drawn.axes] == ["a\nencoder_self\nalpha", "a\ndecoder_cross\nalpha"]


def test_alpha_family_counts_keys(texts):
    drawn = results.alpha_family([1, 1.5, 2], np.array([[0.5, 0.3, 0.2], [0.6, 0.4, 0], [1, 0, 0]]))
    assert list(drawn.axes[1].get_lines()[0].get_ydata()) == [3, 2, 1]
    assert {"key 1", "key 3", "1\nsoftmax"} <= set(texts(drawn))


def test_labels_of_close_lines_are_moved_apart_as_little_as_needed():
    assert np.allclose(results._spread(np.array([0.5, 0.0, 0.52]), 0.1), [0.46, 0.0, 0.56])
    assert np.allclose(results._spread(np.array([0.0, 1.0]), 0.1), [0.0, 1.0])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: results.per_layer(pd.DataFrame(columns=["run", "metric", "layer", "value"]), {"gini": "Gini"}),
        lambda: results.alpha_heatmap({}),
        lambda: results.heads_over_training(pd.DataFrame(columns=["run", "epoch", "layer", "head", "value"])),
    ],
)
def test_runs_without_attention_or_alphas_have_nothing_to_show(draw, texts):
    (words,) = texts(draw())
    assert words.startswith("Nothing to show: ") and "none of the runs has" in words.replace("\n", " ")


def test_paibb_of_heads_is_written_in_their_cells_where_it_was_measured(titles, texts):
    drawn = results.paibb_heatmap({"a": [[0.25, None], [0.5, 1.0]], "b": None})
    assert titles(drawn)[0] == "a" and {"0.25", "–", "0.50", "1.00"} <= set(texts(drawn))
    assert drawn.axes[0].collections[0].get_clim() == (0, 1)
    assert "Nothing to show" in texts(results.paibb_heatmap({"b": None}))[0]
