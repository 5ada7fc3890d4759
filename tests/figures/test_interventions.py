"""Figures of interventions: every function draws small tables without a warning and shows what it promises."""

import numpy as np
import pandas as pd
import pytest

from detrlib.errors import ConfigError
from detrlib.figures import interventions as figures

pytestmark = pytest.mark.filterwarnings("error")


def table(run, trained, alpha, ap):
    """Rows as measured, with AP `ap` as trained and less of it the further from that."""
    rows = [{"kind": "none", "value": "", "AP": ap}]
    rows += [{"kind": "alpha", "value": f"{a:g}", "AP": ap - 0.1 * abs(a - alpha)} for a in (2, 1, 1.5)]
    rows += [{"kind": "transform", "value": name, "AP": ap - 0.01 * len(name)} for name in ("softmax", "sparsemax")]
    rows += [
        {"kind": "head", "value": "pruned", "layer": i, "head": h, "AP": ap - 0.01 * (h - i)}
        for h in range(3)
        for i in (0, 1)
    ]
    rows += [{"kind": "heads", "value": str(n), "AP": ap - 0.02 * n} for n in (2, 1, 10)]
    orders = {"least confident": 0.1, "most confident": 0.4, "draw 1": 0.2, "draw 2": 0.3}
    rows += [
        {"kind": kind, "value": f"{share:.2f} {order}", "AP": ap - cost * share}
        for kind in ("queries", "embeddings")
        for share in (0.5, 0.25)
        for order, cost in orders.items()
    ]
    rows += [{"kind": "query", "value": str(n), "AP": ap - 0.01 * (n % 3)} for n in range(4)]
    rows += [{"kind": "feedforward", "value": "decoder", "layer": 1, "AP": ap - 0.2}]
    rows += [{"kind": "attention", "value": "encoder_self", "layer": layer, "AP": ap - 0.1} for layer in (None, 0)]
    rows += [{"kind": "layer", "value": "encoder", "layer": 0, "AP": ap + 0.01}]
    rows += [{"kind": "level", "value": "decoder_cross 2", "AP": ap - 0.3}]
    rows += [{"kind": "sink", "value": way, "layer": 0, "AP": ap - 0.02} for way in ("masked", "zeroed")]
    rows += [{"kind": "alpha", "value": "1.5", "layer": 1, "AP": 0.9}]  # of one layer: not in figures of all
    frame = pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})
    lost = {
        "AP_lost": ap - frame["AP"],
        "AP_lost_low": ap - frame["AP"] - 0.03,
        "AP_lost_high": ap - frame["AP"] + 0.01,
    }
    same = {"run": run, "site": "decoder_cross", "zeros": 0.5, "trained": trained, "trained_alpha": alpha}
    return frame.assign(paibb=frame["AP"] / 2, **lost, **same)


FRAME = pd.concat(
    [table("softmax-a", "softmax", 1.0, 0.5), table("alpha_entmax-a", "alpha_entmax", 1.4, 0.6)], ignore_index=True
)


def test_alpha_sweep_marks_what_a_run_was_trained_with():
    above, below = figures.alpha_sweep(FRAME).axes
    lines = above.get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[1, 1.5, 2], [1, 1.5, 2], [1.0], [1.4]]  # and two rings
    assert list(lines[0].get_ydata()) == pytest.approx([50, 45, 40]) and list(lines[3].get_ydata()) == [60]
    assert len(below.get_lines()) == 4


def test_transform_swap_writes_trained_by_evaluated(texts):
    drawn = figures.transform_swap(FRAME)
    axes = drawn.axes[0]
    cells = np.reshape(axes.collections[0].get_array(), (2, 3))
    assert cells[0, :2].tolist() == pytest.approx([50, 41])
    assert cells[1].tolist() == pytest.approx([53, 51, 60])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["softmax", "sparsemax", "alpha_entmax"]
    assert {"50.0", "–", "60.0"} <= set(texts(drawn))
    assert [patch.get_x() for patch in axes.patches] == pytest.approx([0.04, 2.04])


def test_head_pruning_counts_and_head_importance_is_what_is_lost(texts):
    line = figures.head_pruning(FRAME).axes[0].get_lines()[0]
    assert list(line.get_xdata()) == [0, 1, 2, 10] and list(line.get_ydata()) == pytest.approx([50, 48, 46, 30])
    drops = figures.head_drops(FRAME)
    assert np.allclose(drops["alpha_entmax-a"], [[0, 0.01, 0.02], [-0.01, 0, 0.01]])
    assert {"+2.0", "-1.0", "softmax-a", "AP points lost"} <= set(texts(figures.head_importance(FRAME)))


def test_query_removal_starts_from_all_queries_and_averages_draws(texts):
    drawn = figures.query_removal(FRAME)
    above, below = drawn.axes
    lines = above.get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[0, 0.25, 0.5]] * 6
    assert list(lines[0].get_ydata()) == pytest.approx([50, 47.5, 45])
    assert list(lines[2].get_ydata()) == pytest.approx([50, 43.75, 37.5])  # the mean of two draws
    assert list(lines[5].get_ydata()) == pytest.approx([60, 50, 40])
    assert list(below.get_lines()[0].get_ydata()) == pytest.approx([0.25, 0.2375, 0.225])
    assert {"at random", "softmax-a", "share of queries removed"} <= set(texts(drawn))
    assert "share of queries whose embedding is zero" in texts(figures.query_removal(FRAME, "embeddings"))
    costs = figures.query_importance(FRAME).axes[0].get_lines()[0].get_ydata()
    assert list(costs) == pytest.approx([2, 1, 0, 0])


def test_parts_stand_in_one_order_with_their_intervals(texts):
    drawn = figures.part_importance(FRAME)
    first, second = drawn.axes
    names = ["encoder layer 1", "encoder_self, all layers", "encoder_self, layer 1", "decoder feed-forward, layer 2"]
    assert [label.get_text() for label in first.get_yticklabels()] == [*names, "decoder_cross, level 3"]
    assert [bar.get_width() for bar in second.patches] == pytest.approx([-1, 10, 10, 20, 30])
    ends = first.collections[0].get_segments()[4]
    assert np.allclose(ends, [[27, 4], [31, 4]])
    assert {"softmax-a", "alpha_entmax-a", "AP points lost"} <= set(texts(drawn))
    sinks = [label.get_text() for label in figures.sink_importance(FRAME).axes[0].get_yticklabels()]
    assert sinks == ["sinks masked, layer 1", "sinks zeroed, layer 1"]


def test_figures_say_what_a_table_lacks(texts):
    (words,) = texts(figures.head_pruning(FRAME[FRAME["kind"].isin(["none", "alpha"])]))
    assert words == "Nothing to show: no interventions of the kind 'heads' were measured, only 'none', 'alpha'."
    draws = (figures.alpha_sweep, figures.transform_swap, figures.head_pruning, figures.head_importance)
    draws += (figures.query_removal, figures.query_importance, figures.part_importance, figures.sink_importance)
    assert {texts(draw(FRAME[:0]))[0] for draw in draws} == {
        "Nothing to show: no interventions were measured (detrlib intervene RUN)."
    }
    with pytest.raises(ConfigError, match="several sites, decoder_cross, encoder_self"):
        figures.alpha_sweep(pd.concat([FRAME, FRAME.assign(site="encoder_self")]))
