"""Explanations: the table of faithfulness, its curves, and explanations over images."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from detrlib.errors import ConfigError
from detrlib.figures import explanations
from detrlib.figures.style import PALETTE
from detrlib.metrics.faithfulness import mean_curves

pytestmark = pytest.mark.filterwarnings("error")


def areas(shift=0.0):
    rows = [
        {"image_id": i, "method": m, "deletion_similarity": d + shift, "insertion_similarity": 1 - d}
        for m, step in (("raw", 0.1), ("box", 0.2))
        for i, d in ((1, step), (1, 3 * step), (2, 2 * step), (3, step))
    ]
    return pd.DataFrame(rows)


def test_the_table_has_a_row_per_run_and_method_with_intervals():
    table = explanations.faithfulness_table({"a": areas(), "b": areas(0.1)}).set_index(["run", "method"])
    raw = table.loc[("a", "raw")]
    assert raw["images"] == 3 and raw["deletion"] == pytest.approx(0.5 / 3)
    assert raw["deletion low"] < raw["deletion"] < raw["deletion high"]
    assert raw["insertion"] == pytest.approx(2.5 / 3)
    assert table.loc[("b", "raw"), "deletion"] == pytest.approx(0.8 / 3)
    alone = explanations.faithfulness_table({"a": areas()[lambda frame: frame["image_id"] == 2]})
    assert alone["deletion low"].isna().all() and alone["deletion"].notna().all()


def test_gains_are_put_into_words_run_by_run():
    table = explanations.gains_table({"a": areas(), "b": areas()})
    assert list(table["run"]) == ["a"] * 2 + ["b"] * 2
    row = table[(table["pair"] == "raw − box") & (table["metric"] == "deletion gain")].iloc[0]
    assert row["difference"] == "+0.167" and row["verdict"] == "not established (3 images)"
    assert explanations.gains_table({}).empty


def test_groups_are_drawn_with_a_dot_for_each_seed_and_a_bar_at_their_mean(texts):
    rows = [
        {"run": f"{group}-seed{seed}", "group": group, "seed": seed, "method": method, "images": 5}
        | {"deletion": 0.1 * seed + shift, "insertion": 0.5}
        for group, shift in (("softmax", 0.0), ("sparsemax", 0.3))
        for seed in (1, 2, 3)
        for method in ("raw", "odam", "box")
    ]
    frame = pd.DataFrame(rows)
    drawn = explanations.faithfulness_by_group(frame)
    assert {"softmax", "sparsemax", "raw", "ODAM", "box"} <= set(texts(drawn))
    first = drawn.axes[0]
    bars = {line.get_label(): line for line in first.get_lines() if line.get_marker() == "|"}
    np.testing.assert_allclose(sorted(bars["raw"].get_xdata()), [0.2, 0.5])
    dots = [line for line in first.get_lines() if line.get_marker() == "o"]
    assert len(dots) == 3 and all(len(line.get_xdata()) == 6 for line in dots)
    few = explanations.faithfulness_by_group(frame, ["box", "raw"])
    assert "ODAM" not in texts(few)
    assert texts(explanations.faithfulness_by_group(frame[:0]))[0].startswith("Nothing to show")


def test_all_methods_have_a_colour_of_their_own():
    assert len(set(explanations.METHOD_COLOURS.values())) == len(explanations.METHOD_COLOURS) == 10


@pytest.mark.parametrize("images", [1, 6])
def test_curves_are_drawn_by_method_with_bands(images, texts):
    values = torch.rand(images, 2, 3, 5, 3, generator=torch.Generator().manual_seed(0))
    frame = mean_curves(values, ["raw", "box", "random"], torch.linspace(0, 1, 5) ** 2)
    drawn = explanations.deletion_insertion_curves(frame, measure="iou")
    assert {"raw", "box", "random", "IoU"} <= set(texts(drawn))
    for number, axes in enumerate(drawn.axes):
        lines = {line.get_label(): line for line in axes.get_lines()}
        np.testing.assert_allclose(lines["box"].get_ydata(), values[:, number, 1, :, 1].mean(0), rtol=1e-5)
        assert to_hex(lines["box"].get_color()) == "#000000"
        if images > 1:
            band = axes.collections[list(lines).index("box")].get_paths()[0].vertices[:, 1]
            own = values[:, number, 1, :, 1]
            assert band.max() == pytest.approx((own.mean(0) + 1.96 * own.std(0) / 6**0.5).max().item(), abs=1e-4)


def test_curves_are_drawn_by_run(texts):
    values = torch.rand(3, 2, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    frame = mean_curves(values, ["raw"], torch.linspace(0, 1, 5) ** 2)
    both = pd.concat([frame.assign(run="softmax-1"), frame.assign(run="sparsemax-1")])
    drawn = explanations.deletion_insertion_curves(both, by="run")
    assert {"softmax-1", "sparsemax-1"} <= set(texts(drawn))
    assert len({line.get_marker() for line in drawn.axes[0].get_lines()}) == 2  # not by their colours alone
    with pytest.raises(ConfigError, match="several curves for one method"):
        explanations.deletion_insertion_curves(both)
    with pytest.raises(ConfigError, match="no curves of 'AP'; there are"):
        explanations.deletion_insertion_curves(frame, measure="AP")


def test_one_method_of_several_runs_is_chosen():
    values = torch.rand(3, 2, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    frame = mean_curves(values, ["raw", "box"], torch.linspace(0, 1, 5) ** 2)
    both = pd.concat([frame.assign(run="softmax-1"), frame.assign(run="sparsemax-1")])
    drawn = explanations.deletion_insertion_curves(both, by="run", method="box")
    line = next(line for line in drawn.axes[0].get_lines() if line.get_label() == "softmax-1")
    np.testing.assert_allclose(line.get_ydata(), values[:, 0, 1, :, 2].mean(0), rtol=1e-5)


def test_without_tested_explanations_there_is_nothing_to_show(texts):
    assert texts(explanations.deletion_insertion_curves(pd.DataFrame())) == [
        "Nothing to show: no explanations were tested (detrlib explain RUN)."
    ]
    assert explanations.faithfulness_table({}).empty


def test_the_grid_has_a_row_per_detection_and_a_column_per_method(texts):
    images = [np.zeros((32, 48, 3), np.uint8), np.zeros((40, 40, 3), np.uint8)]
    maps = {"raw": [np.eye(4), np.eye(5)], "grad_attention": [np.ones((4, 6)), np.zeros((5, 5))]}
    boxes = np.array([[2.0, 3, 20, 30], [5, 5, 9, 9]])
    drawn = explanations.explanations_grid(
        images, boxes, ["star 0.90", "ring 0.50"], maps, labels=[1, 2], names={1: "star", 2: "ring"}
    )
    assert len(drawn.axes) == 7  # the last is the bar
    assert {"raw", "grad × attn", "star 0.90", "ring 0.50"} <= set(texts(drawn))
    assert all(len(axes.patches) == 2 for axes in drawn.axes[:6])  # a box and its rim
    assert [to_hex(axes.patches[1].get_edgecolor()).upper() for axes in drawn.axes[:6:3]] == PALETTE[:2]
